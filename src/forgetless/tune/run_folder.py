"""The folder of a run of tune: whether it may be written, whether a run in it can be resumed, and
its checkpoints.

    check_folder(options, Path("run"))        # OptionError or ValueError, before anything is loaded
    last_checkpoint(Path("run"))              # 'run/checkpoints/checkpoint-40', or None

The trainer writes the checkpoints; here they are found and removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import yaml

from forgetless.data.own_text import OWN_KINDS
from forgetless.errors import OptionError
from forgetless.files.atomic import discard, read_json, write_json, write_text
from forgetless.files.outputs import RESOLVED, claim, local_inputs
from forgetless.files.provenance import sha256_file
from forgetless.files.untrusted import check_mapping
from forgetless.methods.replay_text import OWN_TEXT
from forgetless.model import distributed
from forgetless.model.fingerprint import files_fingerprint
from forgetless.options.option import MEASURED, RUNNING, as_dict, deciding, read_yaml, several
from forgetless.options.tune import TuneOptions

# What a run read when it was started: name -> sha256 of the rows, or of a file.
INPUTS = "inputs.json"


def check_folder(options: TuneOptions, out: Path) -> None:
    """Refuse a folder that holds another run, an input or something that we did not write.

    Nothing is removed yet. Raises ValueError, or OptionError where the run in it was started with
    other options or would be written over an input.
    """
    claim(out, "tune", _names_to_write(options), local_inputs(options))
    if options.resume:
        check_resumed(options, out)
    if (out / "run.json").exists() and not (options.overwrite or options.resume):
        raise ValueError(f"'{out}' holds a finished run; give another --out, or --overwrite")
    if _has_begun_to_train(out) and not (options.resume or options.overwrite):
        raise ValueError(
            f"'{out}' holds checkpoints of an unfinished run; go on with --resume, or start "
            "again with --overwrite"
        )
    distributed.barrier()  # before anything is written, every process has looked


def _has_begun_to_train(out: Path) -> bool:
    """Whether a run left checkpoints. The trainer makes their folder before a budget is looked at,
    so that an empty one is of a command that was refused.
    """
    checkpoints = out / "checkpoints"
    return checkpoints.exists() and not (checkpoints.is_dir() and not any(checkpoints.iterdir()))


def _names_to_write(options: TuneOptions) -> list[str]:
    """The names of what a run on one domain writes in its folder."""
    names = [RESOLVED, INPUTS, "run.json", "checkpoints", "final"]
    if options.budget:
        names.append("unscaled")
    if set(several(options.replay)) & set(OWN_KINDS):
        names.append(OWN_TEXT)
    return names


def check_resumed(options: TuneOptions, out: Path, *, measured: bool = False) -> None:
    """Raise OptionError where the options that decide the result are not those that the interrupted
    run was started with.

    With `measured`, neither may those change that decide what it is measured on.
    """
    path = out / RESOLVED
    if not path.is_file():
        return
    then, now = read_yaml(path), as_dict(options)
    may_change = set(deciding(TuneOptions, RUNNING))
    if not measured:
        free = {"tasks", "behaviours"}  # a budget is controlled by everything else that is measured
        may_change |= free if options.budget else set(deciding(TuneOptions, MEASURED))
    if options.strength is None:  # then it was what suits the importance file, which is compared
        may_change.add("strength")
    different = sorted(
        key for key in now if key in then and now[key] != then[key] and key not in may_change
    )
    if different:
        raise OptionError(
            f"{path} was made with other options: "
            f"{', '.join(f'{k}={then[k]!r} (now {now[k]!r})' for k in different)}; "
            "use the same, or --overwrite without --resume"
        )


def check_inputs(hashes: Mapping[str, str], out: Path) -> None:
    """Raise ValueError where what a resumed run reads is not what it was started with.

    `hashes` are compared with those in INPUTS, which lies beside RESOLVED.
    """
    path = out / INPUTS
    then = check_mapping(read_json(path), str(path)) if path.is_file() else {}
    changed = sorted(name for name, digest in hashes.items() if then.get(name, digest) != digest)
    if changed:
        raise ValueError(
            f"'{out}' was started with other data or files: changed are the "
            f"{', the '.join(changed)}; give the same, or start again with --overwrite"
        )


def hashes_of_files(options: TuneOptions, importance: Path | None) -> dict[str, str]:
    """Hashes of what a run is made with beside its data, as `check_inputs` takes them."""
    hashes = {"base model": files_fingerprint(options)}
    if importance is not None:
        hashes["importance file"] = sha256_file(importance)
    if options.prompts:
        hashes["prompts"] = sha256_file(Path(options.prompts).expanduser())
    if options.after:
        adapter = Path(options.after) / "final" / "adapter_model.safetensors"
        hashes["adapter of --after"] = sha256_file(adapter)
    return hashes


def begin(options: TuneOptions, hashes: Mapping[str, str], out: Path) -> None:
    """Write what the run is started with, now that everything was read: its options and the hashes
    of its data.

    The run.json and the checkpoints of a run that is overwritten are removed, since they must not
    stand for this one, and so is what a kill left of a checkpoint.
    """
    if not distributed.first():
        return
    if not options.resume:
        discard(out / "run.json")
        discard(out / "checkpoints")
    clear_checkpoints(out / "checkpoints")
    write_json(out / INPUTS, dict(hashes))
    write_text(out / RESOLVED, yaml.safe_dump(as_dict(options), sort_keys=False))


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that was written to its end; None where there is none."""
    steps = {}
    for path in (out / "checkpoints").glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and _is_whole(path):
            steps[int(step)] = path
    return str(steps[max(steps)]) if steps else None


def clear_checkpoints(folder: Path) -> None:
    """Remove checkpoints that were not written to their end."""
    for checkpoint in folder.glob("checkpoint-*"):
        if distributed.first() and not _is_whole(checkpoint):
            discard(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end.

    The trainer writes trainer_state.json last, and may be killed in the middle of it.
    """
    with contextlib.suppress(ValueError):
        return isinstance(read_json(checkpoint / "trainer_state.json"), dict)
    return False
