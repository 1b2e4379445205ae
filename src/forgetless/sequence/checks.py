"""What a sequence is started with: everything that can be refused before a model is loaded, and the
domains with their held-out rows written.

    plan = planned(options)      # OptionError or ValueError, or a Plan

It writes DIR/resolved.yaml, DIR/inputs.json and DIR/data/, and with --overwrite removes what an
earlier run left.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from forgetless.budget.baseline import check_held_out
from forgetless.budget.open import check_budget
from forgetless.data.documents import (
    Document,
    fingerprint_documents,
    fingerprint_rows,
    load_documents,
)
from forgetless.data.domain import load_training_data, row_text
from forgetless.data.own_text import read_text
from forgetless.data.tasks import find_task
from forgetless.errors import OptionError
from forgetless.files.atomic import discard, write_json, write_text
from forgetless.files.hub import importance_path
from forgetless.files.outputs import RESOLVED, claim, local_inputs, ours_in
from forgetless.importance.importance import Importance
from forgetless.importance.recorded_on import check_recorded_text
from forgetless.methods.table import chosen
from forgetless.model import distributed
from forgetless.options.holding import AUTO
from forgetless.options.methods import METHODS
from forgetless.options.option import as_dict, parse_rule, several
from forgetless.options.tune import TuneOptions
from forgetless.sequence.domains import Domain, earlier_of, named
from forgetless.sequence.steps import IMPORTANCE, Step, Steps
from forgetless.tune.base import file_in_cache
from forgetless.tune.run_folder import INPUTS, check_inputs, check_resumed, hashes_of_files

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Plan:
    """What all steps share.

    `before`: the domains of the run that is gone on from, learned at once as far as this one can
    tell; `start`: its adapter.
    """

    options: TuneOptions
    out: Path
    domains: tuple[Domain, ...]
    before: tuple[Domain, ...] = ()
    start: str | None = None

    @property
    def all(self) -> tuple[Domain, ...]:
        return (*self.before, *self.domains)

    @property
    def first(self) -> int:
        """The row of the measurements that this command starts from: 0 is the bare base, 1 the run
        that is gone on from.
        """
        return 1 if self.start else 0

    @property
    def learned(self) -> list[int]:
        """After which row each domain is learned."""
        return [1] * len(self.before) + [self.first + i for i in range(1, len(self.domains) + 1)]

    def step(self, row: int) -> Path:
        return self.out / "steps" / str(row)

    def steps(self) -> Steps:
        """The same as the engine takes it."""
        each = [
            Step(domain, self._options(domain), self.step(self.first + number))
            for number, domain in enumerate(self.domains, 1)
        ]
        return Steps(tuple(each), self.start, self.before)

    def _options(self, domain: Domain) -> TuneOptions:
        return replace(
            self.options,
            data=domain.train,
            eval_data=domain.held,
            eval_split=domain.held_split,
            after=None,
            final_rank=None,
            keep_all=False,
        )


def planned(options: TuneOptions) -> Plan:
    """Everything that can be refused before a model is loaded, and the domains with their held-out
    rows written.
    """
    out = Path(options.out)
    if options.columns:
        raise OptionError(
            "--columns names the columns of one domain; with several, write the rows with prompt "
            "and completion, messages or text"
        )
    options, before, start = _gone_on_from(options)
    parse_rule(options.consolidate or "sum")
    _check_processes(options)
    _check_behaviours(options)
    _check_names(options)
    _check_methods(options)
    _check_folder(options, out)
    domains = named(options, out, taken=[domain.name for domain in before])
    given = _check_rows(options, before, domains, out)
    if not options.resume and (options.overwrite or not _has_begun(out)):
        _remove_earlier_run(out, domains)
    write_json(out / INPUTS, given)
    write_text(out / RESOLVED, yaml.safe_dump(as_dict(options), sort_keys=False))
    if options.importance == AUTO:
        options = replace(options, importance=str(file_in_cache(options)))
    elif options.importance:
        options = replace(options, importance=str(importance_path(options.importance)))
    return Plan(replace(options, push_to_hub=None, private=None), out, domains, before, start)


def _check_behaviours(options: TuneOptions) -> None:
    """Behaviours are compared with one base, and each step of a sequence has another."""
    if options.behaviours is not None:
        raise OptionError(
            "--behaviours is for one domain; with several, leave it out and compare the result: "
            f"forgetless eval {options.model} --adapter {options.out}/final --behaviours "
            f"{options.behaviours}"
        )


def _gone_on_from(options: TuneOptions) -> tuple[TuneOptions, tuple[Domain, ...], str | None]:
    """(options, the domains of the run that --after names, its adapter); that run's importance is
    gone on with, where no other is given.
    """
    if not options.after:
        return options, (), None
    before, start, importance = earlier_of(options)
    options = replace(options, importance=options.importance or importance)
    if options.importance is None and options.method == "hold":  # the default beside --after
        logger.warning(
            "%s was tuned without importance, and none is given: nothing but a budget holds "
            "it; --importance FILE does",
            options.after,
        )
        options = replace(options, method="plain")
    return options, before, start


def _check_processes(options: TuneOptions) -> None:
    distributed.start(options.device)
    processes = distributed.world_size()
    if processes > 1:
        raise OptionError(
            f"several domains are tuned in one process, found {processes}; start one "
            "process, or tune on all of the data at once"
        )


def _check_names(options: TuneOptions) -> None:
    """Raise OptionError for a misspelt task, before the rows of another are written, and for
    held-out rows that do not go with the domains.
    """
    for spec in (*several(options.data), *several(options.eval_data)):
        find_task(spec)
    given = several(options.eval_data)
    if given and len(given) != len(several(options.data)):
        raise OptionError(
            "--eval-data is given for each --data in its order: expected "
            f"{len(several(options.data))} of it, found {len(given)}"
        )


def _check_methods(options: TuneOptions) -> None:
    """Raise OptionError for what does not end as one LoRA adapter for the base."""
    wrong = None
    if options.full:
        wrong = "--full"
    elif options.anchor == "recorded":
        wrong = "--anchor recorded"
    elif options.quantize != "none":
        wrong = f"--quantize {options.quantize}"
    if wrong:
        raise OptionError(
            f"{wrong} cannot be used with several domains or --after: each step stands on the "
            "updates before it, merged into the base, and the "
            "result is one LoRA adapter; leave it out"
        )
    methods = chosen(options)
    for name, method in methods.items():
        if method.adapter or method.save or METHODS[name].needs_earlier:
            raise OptionError(
                f"--method {name} cannot be used with several domains or --after: the steps' "
                "updates are added up as plain LoRA"
            )
    check_budget(options, list(methods))
    if options.final_rank is not None and options.budget:
        raise OptionError(
            "--final-rank changes the result after the budget was checked; leave out one of them"
        )


def _check_folder(options: TuneOptions, out: Path) -> None:
    """Refuse a folder that holds another run, an input or something that we did not write.

    Nothing is removed yet.
    """
    names = [RESOLVED, INPUTS, "run.json", "steps", "final", IMPORTANCE]
    if not options.eval_data:
        names.append("data")
    claim(out, "tune", names, local_inputs(options))
    if options.resume:
        # What the earlier domains were measured on must not change for the later ones.
        check_resumed(options, out, measured=True)
        return
    if _has_begun(out) and not options.overwrite:
        run = "an unfinished run; go on with --resume"
        if (out / "run.json").exists():
            run = "a finished run"
        raise ValueError(f"'{out}' holds {run}; give another --out, or --overwrite")


def _has_begun(out: Path) -> bool:
    """Whether a run in a folder has trained. One that was refused before, as a budget that its text
    cannot show, has left nothing that the corrected command could not write anew.
    """
    return (out / "run.json").exists() or any((out / "steps").glob(f"*/{RESOLVED}"))


def _remove_earlier_run(out: Path, domains: tuple[Domain, ...]) -> None:
    """Remove what the run that is overwritten left, now that everything was read.

    In data/ that are the files of domains that this run does not have; what else somebody has put
    there stays.
    """
    for name in {"run.json", "steps", "final", IMPORTANCE, INPUTS} & set(ours_in(out)):
        discard(out / name)
    written = {place for domain in domains for place in (domain.train, domain.held)}
    for path in (out / "data").glob("*.jsonl") if "data" in ours_in(out) else ():
        of_ours = re.fullmatch(r"\d+-.+\.(train|held)\.jsonl", path.name)
        if of_ours and not any(place.endswith(str(path.resolve())) for place in written):
            discard(path)


def _check_general_text(options: TuneOptions, documents: list[Document]) -> None:
    """Refuse a budget on general text that the importance was recorded on."""
    if options.importance and options.importance != AUTO:
        importance = Importance.load(importance_path(options.importance))
        check_recorded_text(options, importance, documents)


def _check_rows(
    options: TuneOptions, before: tuple[Domain, ...], domains: tuple[Domain, ...], out: Path
) -> dict[str, str]:
    """Hashes of the data.

    Raises ValueError where it is not what an interrupted run was started with, and with a budget
    for too few held-out rows.
    """
    every = (*before, *domains)
    held = [
        load_training_data(domain.held, split=domain.held_split, limit=options.limit)
        for domain in every
    ]
    if options.budget:
        for domain, rows in zip(every[:-1], held, strict=False):
            check_held_out(domain.name, len({row_text(row) for row in rows}))
    given = {}
    for domain, rows in zip(every, held, strict=True):
        given[f"held-out rows of {domain.name}"] = fingerprint_rows(list(rows))
    for domain in domains:
        trained = load_training_data(domain.train, split=domain.split or options.data_split)
        given[f"rows of {domain.name}"] = fingerprint_rows(list(trained))
    if text := read_text(options.general):
        documents = load_documents(
            text,
            column=options.text_column,
            split=options.general_split,
            limit=options.limit,
        )
        given["general text"] = fingerprint_documents(documents)
        _check_general_text(options, documents)
    file = importance_path(options.importance) if options.importance else None
    given |= hashes_of_files(options, file)
    if options.resume:
        check_inputs(given, out)
    return given
