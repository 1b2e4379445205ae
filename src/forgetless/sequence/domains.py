"""The domains of a sequence: what each is called, what it is trained on, and the rows it is
measured by and held on later.

Rows come from --eval-data where given. Else a tenth of a domain's rows (at least 20, at most 200,
never more than a quarter) is kept from training, chosen by the hash of its content, so that order
and number of the others do not matter:

    DIR/data/2-sciq.train.jsonl, DIR/data/2-sciq.held.jsonl

    named(options, Path("run"))      # (Domain(name='sciq',
                                     train='sciq=run/data/1-sciq.train.jsonl', held=...), ...)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.data.domain import load_training_data
from forgetless.data.tasks import find_task, load_task
from forgetless.errors import OptionError
from forgetless.files.atomic import read_json, write_text
from forgetless.options.option import several
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Domain:
    """One domain.

    `split` and `held_split` are those of a Hub dataset; None for `held_split`: the held-out one,
    for `split`: that of the command.
    """

    name: str
    train: str
    held: str
    held_split: str | None = None
    split: str | None = None


def named(options: TuneOptions, out: Path, *, taken: Sequence[str] = ()) -> tuple[Domain, ...]:
    """The domains that `options` name, with held-out rows written where none are given.

    Names that are `taken`, or come twice, get a number.
    """
    given, found = several(options.eval_data), []
    used = list(taken)
    for number, spec in enumerate(several(options.data), 1):
        name = _free(_short(spec), used)
        used.append(name)
        if given:
            found.append(
                Domain(
                    name,
                    spec,
                    given[number - 1],
                    held_split=options.eval_split,
                    split=options.data_split,
                )
            )
        else:
            found.append(
                Domain(name, *_parted(spec, options.data_split, out / "data" / f"{number}-{name}"))
            )
    return tuple(found)


def earlier_of(options: TuneOptions) -> tuple[tuple[Domain, ...], str, str | None]:
    """(domains, adapter, importance file) of the finished run that --after names.

    Raises ValueError or OptionError where it cannot be gone on from.
    """
    folder = Path(options.after or "")
    if (
        not (folder / "run.json").is_file()
        or not (folder / "final" / "adapter_config.json").is_file()
    ):
        raise ValueError(
            f"--after '{folder}': expected a finished run of forgetless tune, with run.json and "
            "an adapter in final/; give the --out of such a run"
        )
    run = read_json(folder / "run.json")
    then = run["configuration"]
    if "eval_data" not in then:
        raise ValueError(
            f"--after '{folder}' was not written by forgetless tune, so it does not say which "
            "data must not be lost; give the folder of a run of tune"
        )
    kind = read_json(folder / "final" / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"--after '{folder}': its adapter is of type {kind}, expected LORA, since the "
            "updates are added up as one; tune with a LoRA method"
        )
    if (
        Path(str(then["model"])).resolve() != Path(options.model).resolve()
        and then["model"] != options.model
    ):
        raise OptionError(
            f"--after '{folder}' was tuned on '{then['model']}', found MODEL '{options.model}'; "
            "give the same"
        )
    if "sequence" in run:
        domains = tuple(Domain(**one) for one in run["sequence"]["held"].values())
    elif then["eval_data"]:
        domains = (
            Domain(
                _short(then["data"]),
                then["data"],
                then["eval_data"],
                held_split=then["eval_split"],
                split=then["data_split"],
            ),
        )
    else:
        logger.warning(
            "%s had no --eval-data: its domain is measured and held on rows that it was trained on",
            folder,
        )
        domains = (
            Domain(
                _short(then["data"]),
                then["data"],
                then["data"],
                held_split=then["data_split"],
                split=then["data_split"],
            ),
        )
    file = (
        folder / "importance.safetensors"
    )  # of a sequence; what else is called so in the folder of a single run, an earlier one left
    return (
        domains,
        str(folder / "final"),
        str(file) if "sequence" in run and file.is_file() else then["importance"],
    )


def _parted(spec: str, split: str, start: Path) -> tuple[str, str]:
    """Training and held-out rows of a domain as two files, written anew each time: the same from
    the same data. Raises ValueError where they were others.
    """
    task = find_task(spec)
    rows: list[dict[str, Any]] = (
        load_task(spec, split=split)[1] if task else list(load_training_data(spec, split=split))
    )
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    ordered = sorted(set(lines), key=lambda line: hashlib.sha256(line.encode()).digest())
    held = set(ordered[: min(200, max(20, len(ordered) // 10), len(ordered) // 4)])
    if not held:
        raise ValueError(
            f"'{spec}' has {len(ordered)} different rows, too few to keep some from training; "
            "give --eval-data for each domain"
        )
    logger.info(
        "%s: %d of %d rows are kept from training, to measure it by; --eval-data gives others",
        spec,
        len(held),
        len(rows),
    )
    specs = []
    for part, chosen in (
        ("train", [line for line in lines if line not in held]),
        ("held", [line for line in lines if line in held]),
    ):
        path, text = (
            start.with_name(f"{start.name}.{part}.jsonl").resolve(),
            "\n".join(chosen) + "\n",
        )
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"'{spec}' is no longer what this run was started with ({path}); give the same "
                "data, or start again with --overwrite"
            )
        write_text(path, text)
        specs.append(f"{task[0].name}={path}" if task else str(path))
    return specs[0], specs[1]


def _short(spec: str) -> str:
    """A name for people: that of the task, or of the file without its ending."""
    name, mark, _ = spec.partition("=")
    return name if mark else Path(spec).stem


def _free(name: str, used: Sequence[str]) -> str:
    number = 2
    fresh = name
    while fresh in used:
        fresh, number = f"{name}-{number}", number + 1
    return fresh
