"""The saved state of a recording, from which `--resume` goes on.

A state lies beside the file to write: FILE.state, and with several processes FILE.state.1 and so on
for the others. There are three kinds, since a recording trains an adapter or observes the bare
model, and calibrates when its importance is written:

    write(options, ObservedState(...))        # atomic; all processes at about the same moment
    state = load_state(options)              # None without --resume, or where there is no state

A state is read with weights_only, so that no code in it can run, and it is refused where it was
made with other options, by another number of processes, or from other text.
"""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.errors import OptionError
from forgetless.files.atomic import atomic_path
from forgetless.files.outputs import check_new_file, local_inputs
from forgetless.files.untrusted import JsonObject
from forgetless.importance.calibration import MeasuredUpdate
from forgetless.model import distributed
from forgetless.model.fingerprint import files_fingerprint
from forgetless.options.option import RUNNING, as_dict, deciding
from forgetless.options.record import RecordOptions

# Options that are applied when the recording has ended, and so don't decide what a state holds.
ONLY_WRITTEN = ("tier", "keep_anchor")
logger = logging.getLogger("forgetless")


# What `state_dict` of a recorder, an optimizer or a schedule gives: tensors and plain data, which
# torch.save writes and torch.load reads with weights_only.
StateDict = dict[str, Any]


@dataclass(frozen=True)
class TrainedState:
    """A path estimator's training after some of its steps."""

    data: str  # sha256 of the text
    adapter: dict[str, Tensor]  # parameter name -> its values
    recorder: StateDict
    optimizer: StateDict
    scheduler: StateDict
    done: int  # optimizer steps
    seconds: float
    rng: Tensor  # torch's random state, which dropout draws from


@dataclass(frozen=True)
class ObservedState:
    """An observing estimator's passes after some of their batches."""

    data: str  # sha256 of the text
    recorder: StateDict
    done: int  # batches
    seconds: float


@dataclass(frozen=True)
class CalibratedState:
    """A calibration after some of its updates; the importance itself is written already."""

    data: str  # sha256 of the documents kept apart
    done: int  # updates
    calibrated: list[MeasuredUpdate]


State = TrainedState | ObservedState | CalibratedState
KINDS: tuple[type[State], ...] = (TrainedState, ObservedState, CalibratedState)


def place(options: RecordOptions) -> Path:
    """Where this process saves its state."""
    return Path(f"{options.out}.state" + (f".{distributed.rank()}" if distributed.rank() else ""))


def comparable(options: RecordOptions) -> JsonObject:
    """The options that decide what is recorded, as they must be again to go on."""
    free = (*deciding(RecordOptions, RUNNING), *ONLY_WRITTEN)
    return {name: value for name, value in as_dict(options).items() if name not in free}


def check_place(options: RecordOptions) -> None:
    """Raise where the state would be written over an input, or over another program's file."""
    # With --resume it is read, and refused there where it is no state.
    is_state = (lambda path: True) if options.resume else zipfile.is_zipfile
    check_new_file(place(options), is_state, local_inputs(options))


def check_unfinished(options: RecordOptions) -> None:
    """Raise ValueError where a finished recording would be lost: hours of work on a large model."""
    going_on = options.resume and place(options).exists()
    out = Path(options.out)
    if out.is_file() and out.stat().st_size > 0 and not (options.overwrite or going_on):
        raise ValueError(
            f"'{options.out}' holds a finished recording; give another --out, or --overwrite"
        )


def write(options: RecordOptions, state: State) -> None:
    """Save `state`, whole or not at all."""
    held = dict(vars(state))
    if isinstance(state, CalibratedState):
        held["calibrated"] = [update.plain() for update in state.calibrated]
    plain = {
        "options": comparable(options),
        **held,
        "processes": distributed.world_size(),
        "base": files_fingerprint(options),
    }
    with atomic_path(place(options), of=options.out) as temporary:
        torch.save(plain, temporary)
        distributed.barrier()  # all states are renamed at about the same moment


def load_state(options: RecordOptions) -> State | None:
    """The saved state to go on from; None without --resume, or where there is none.

    Raises ValueError for a file that is no whole state, OptionError where it was made with other
    options or by another number of processes.
    """
    if not options.resume:
        return None
    path = place(options)
    if not any(distributed.collect(path.is_file())):
        logger.info("no saved state beside %s: starting from the beginning", options.out)
        return None
    plain = _read_state(path)
    state = state_of(path, plain)
    _check_same_processes(options, path, plain.get("processes", 1), state.done)
    _check_same_options(options, path, plain["options"])
    if plain.get("base") != files_fingerprint(options):
        raise ValueError(
            f"{path} was made on another model than lies at '{options.model}' now; bring that one "
            "back, or start again without --resume"
        )
    return state


def state_of(path: str | Path, plain: Any) -> State:
    """The state that a file holds as plain data.

    Raises ValueError where it holds none.
    """
    if isinstance(plain, dict) and isinstance(plain.get("options"), dict):
        held = set(plain) - {"options", "processes", "base"}
        for kind in KINDS:
            names = {field.name for field in fields(kind)}
            if held == names:
                state = kind(**{name: plain[name] for name in names})
                return _with_updates(state) if isinstance(state, CalibratedState) else state
    raise ValueError(
        f"{path} is not a saved state of forgetless record; remove it, or start again "
        "without --resume"
    )


def _with_updates(state: CalibratedState) -> CalibratedState:
    """The state with its updates, which the file holds as plain data."""
    plain: list[Any] = state.calibrated
    return replace(state, calibrated=[MeasuredUpdate.of(update) for update in plain])


def check_same_text(options: RecordOptions, state: State, sha256: str) -> None:
    """Raise ValueError where `state` was made from other text than that of this hash."""
    if state.data != sha256:
        raise ValueError(
            f"{options.out}.state was made from other general text; give the same --general, or "
            "start again without --resume"
        )


def _read_state(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is not a whole saved state ({first}); remove it, or start again without "
            "--resume"
        ) from error


def _check_same_processes(options: RecordOptions, path: Path, then: int, done: int) -> None:
    """Raise unless as many processes saved it as there are now, all after the same step.

    `then`: how many processes saved it, `done`: after how many steps this one did.
    """
    if then != distributed.world_size():
        raise OptionError(
            f"{path} was made by {then} process(es), found {distributed.world_size()}; use as "
            "many, or no --resume"
        )
    if len(set(distributed.collect(done))) > 1:
        raise ValueError(
            f"the processes' states beside {options.out} are of different steps, as when "
            "interrupted while writing; start again without --resume"
        )


def _check_same_options(options: RecordOptions, path: Path, then: JsonObject) -> None:
    """Raise unless the options that decide what is recorded are those of `then`."""
    now = comparable(options)
    different = sorted(key for key in now if now[key] != then.get(key))
    if different:
        pairs = ", ".join(f"{key}={then.get(key)!r} (now {now[key]!r})" for key in different)
        raise OptionError(
            f"{path} was made with other options: {pairs}; use the same, or no --resume"
        )
