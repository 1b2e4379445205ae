"""The domains of a sequence: what each is called, what it is trained on, and the rows it is
measured by and held on later.

Rows come from --eval-data where given. Else a tenth of a domain's rows (at least 20, at most 200,
never more than a quarter) is kept from training, chosen by the hash of its content, so that order
and number of the others do not matter:

    DIR/data/2-sciq.train.jsonl, DIR/data/2-sciq.held.jsonl

    named(options, Path("run"))
    # (Domain(name='sciq', train='sciq=run/data/1-sciq.train.jsonl', held=...), ...)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetless.data.documents import Row
from forgetless.data.domain import load_training_data
from forgetless.data.tasks import TASKS, find_task, load_task
from forgetless.errors import OptionError
from forgetless.files.atomic import read_json, write_text
from forgetless.files.run_json import Run
from forgetless.files.schema import from_json, read_record
from forgetless.files.untrusted import JsonObject, check_mapping
from forgetless.options.holding import AUTO
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


@dataclass(frozen=True)
class OptionsThen:
    """What is read of the options of a run that --after names, as its run.json says them."""

    data: str
    data_split: str | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    importance: str | None = None


def named(options: TuneOptions, out: Path, *, taken: Sequence[str] = ()) -> tuple[Domain, ...]:
    """The domains that `options` name, with held-out rows written where none are given.

    Names that are `taken`, or come twice, get a number.
    """
    given = several(options.eval_data)
    domains: list[Domain] = []
    used = list(taken)
    for number, spec in enumerate(several(options.data), 1):
        name = _free(_short(spec), used)
        used.append(name)
        if given:
            domains.append(_as_given(spec, given[number - 1], options, name))
        else:
            start = out / "data" / f"{number}-{name}"
            anew = options.overwrite and not options.resume
            domains.append(Domain(name, *_parted(spec, options.data_split, start, anew)))
    return tuple(domains)


def _as_given(train: str, held: str, options: TuneOptions, name: str) -> Domain:
    return Domain(name, train, held, held_split=options.eval_split, split=options.data_split)


def earlier_of(options: TuneOptions) -> tuple[tuple[Domain, ...], str, str | None]:
    """(domains, adapter, importance file) of the finished run that --after names.

    Raises ValueError or OptionError where it cannot be gone on from.
    """
    folder = Path(options.after or "")
    _check_finished(folder)
    place = folder / "run.json"
    run = read_record(place, Run)
    _check_gone_on_from(folder, run.configuration, options.model)
    then = from_json(run.configuration, OptionsThen, f"{place}.configuration")
    if run.sequence is not None:
        held = from_json(run.sequence.held, dict[str, Domain], f"{place}.sequence.held")
        domains = tuple(held.values())
    else:
        domains = (_domain_of_run(folder, then),)
    # The file is of a sequence; in the folder of a single run, an earlier one has left it.
    file = folder / "importance.safetensors"
    importance = str(file) if run.sequence is not None and file.is_file() else then.importance
    if importance == AUTO and run.importance is not None:
        importance = None if run.importance.file is None else str(run.importance.file)
    return domains, str(folder / "final"), importance


def _check_finished(folder: Path) -> None:
    """Raise ValueError where no finished run with an adapter lies."""
    adapter = folder / "final" / "adapter_config.json"
    if not (folder / "run.json").is_file() or not adapter.is_file():
        raise ValueError(
            f"--after '{folder}': expected a finished run of forgetless tune, with run.json and "
            "an adapter in final/; give the --out of such a run"
        )


def _check_gone_on_from(folder: Path, then: JsonObject, model: str) -> None:
    """Raise ValueError or OptionError for a run of another verb, of another kind of adapter, or on
    another model; `then` are its options.
    """
    if "eval_data" not in then:
        raise ValueError(
            f"--after '{folder}' was not written by forgetless tune, so it does not say which "
            "data must not be lost; give the folder of a run of tune"
        )
    config = folder / "final" / "adapter_config.json"
    kind = check_mapping(read_json(config), str(config)).get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"--after '{folder}': its adapter is of type {kind}, expected LORA, since the "
            "updates are added up as one; tune with a LoRA method"
        )
    name = str(then.get("model"))
    if Path(name).resolve() != Path(model).resolve() and name != model:
        raise OptionError(
            f"--after '{folder}' was tuned on '{name}', found MODEL '{model}'; give the same"
        )


def _domain_of_run(folder: Path, then: OptionsThen) -> Domain:
    """The domain of a run on one domain; `then` are its options."""
    name, train, split = _short(then.data), then.data, then.data_split
    if then.eval_data:
        return Domain(name, train, then.eval_data, held_split=then.eval_split, split=split)
    logger.warning(
        "%s had no --eval-data: its domain is measured and held on rows that it was trained on",
        folder,
    )
    return Domain(name, train, train, held_split=split, split=split)


def _parted(spec: str, split: str, start: Path, anew: bool) -> tuple[str, str]:
    """Training and held-out rows of a domain as two files, written anew each time: the same from
    the same data. Raises ValueError where they were others, unless the run starts `anew`.
    """
    task = find_task(spec)
    rows: Sequence[Row]
    if task:
        _, rows = load_task(spec, split=split)
    else:
        rows = load_training_data(spec, split=split)
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    held = _chosen_to_hold(spec, lines)
    logger.info(
        "%s: %d of %d rows are kept from training, to measure it by; --eval-data gives others",
        spec,
        len(held),
        len(rows),
    )
    train = _write_rows(spec, start, "train", [line for line in lines if line not in held], anew)
    kept = _write_rows(spec, start, "held", [line for line in lines if line in held], anew)
    prefix = f"{task[0].name}=" if task else ""
    return f"{prefix}{train}", f"{prefix}{kept}"


def _chosen_to_hold(spec: str, lines: Sequence[str]) -> set[str]:
    """The rows that are kept from training, by the hash of their content."""
    ordered = sorted(set(lines), key=lambda line: hashlib.sha256(line.encode()).digest())
    held = set(ordered[: min(200, max(20, len(ordered) // 10), len(ordered) // 4)])
    if not held:
        raise ValueError(
            f"'{spec}' has {len(ordered)} different rows, too few to keep some from training; "
            "give --eval-data for each domain"
        )
    return held


def _write_rows(spec: str, start: Path, part: str, lines: Sequence[str], anew: bool) -> Path:
    path = start.with_name(f"{start.name}.{part}.jsonl").resolve()
    text = "\n".join(lines) + "\n"
    if not anew and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"'{spec}' is no longer what this run was started with ({path}); give the same "
            "data, or start again with --overwrite"
        )
    write_text(path, text)
    return path


def _short(spec: str) -> str:
    """A name for people: that of the task, or of the file without its ending."""
    name, mark, _ = spec.partition("=")
    return name if mark and name in TASKS else Path(spec).stem


def _free(name: str, used: Sequence[str]) -> str:
    number = 2
    fresh = name
    while fresh in used:
        fresh, number = f"{name}-{number}", number + 1
    return fresh
