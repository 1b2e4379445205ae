"""tune() on several domains, one after the other: each is learned on top of what was learned
before, which is held from then on.

For each domain: importance is recorded on the one before and consolidated with what there is
(importance/consolidate.py), the model with every update so far merged into it is tuned (its
anchor is that model), and the result is measured on general text and on every domain as anybody
would load it: the base with one plain PEFT adapter, the exact sum of the steps' updates
(model/stack.py). A budget covers general text, from the model that the command started from, and every
earlier domain, from when it was learned; by the end of step i of n, i/n of it may be spent.

    DIR/final/             the adapter for all of the domains, relative to the base
    DIR/importance.safetensors    what the last step was held by, for `tune --after DIR`
    DIR/data/              rows held out of each domain that came without --eval-data
    DIR/steps/2/           the run of a step as tune writes it, what it was held by, its
                           measurements; with --keep-all its adapter, for the base
    DIR/run.json           the matrix of losses (and of accuracies), transfer (transfer.py), the
                           rise of general loss after each step

Whatever is finished is found again: --resume goes on within a recording or a training, and gives
the same files as an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from forgetless.budget.baseline import check_held_out
from forgetless.budget.open import check_budget
from forgetless.data.documents import fingerprint_documents, fingerprint_rows, load_documents
from forgetless.data.tasks import find_task, load_training_data, row_text
from forgetless.errors import OptionError
from forgetless.evaluate.evaluate import changes
from forgetless.files.atomic import atomic_path, discard, read_json, write_json, write_text
from forgetless.files.hub import importance_path, ready
from forgetless.files.lock import only_writer
from forgetless.files.provenance import environment, sha256_file
from forgetless.importance.importance import Importance
from forgetless.methods.table import chosen
from forgetless.model import distributed
from forgetless.model.loading import load_model
from forgetless.model.stack import stack
from forgetless.model.stages import Earlier, LearnedDomain, Stage, merged
from forgetless.options.option import as_dict, parse_rule, several
from forgetless.options.tune import TuneOptions
from forgetless.sequence.domains import Domain, earlier_of, named
from forgetless.sequence.importance import consolidate
from forgetless.sequence.matrix import lines, measured, sequence_of
from forgetless.tune.result import push_result
from forgetless.tune.run_folder import INPUTS, check_inputs, check_resumed
from forgetless.tune.tune import tune

logger = logging.getLogger("forgetless")
IMPORTANCE = "importance.safetensors"  # in --out


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


def tune_in_turn(options: TuneOptions) -> dict[str, Any]:
    """Fine-tune on each of `options.data` in its turn; writes `options.out` and returns what is in
    its run.json.
    """
    repo = ready(options.push_to_hub, private=options.private) if options.push_to_hub else None
    with only_writer(options.out):
        run = _in_turn(options)
    if repo:
        push_result(repo, Path(options.out) / "final", run)
    return run


def _in_turn(options: TuneOptions) -> dict[str, Any]:
    started = time.perf_counter()
    plan = _planned(options)
    if options.resume and (plan.out / "run.json").exists():
        run: dict[str, Any] = read_json(plan.out / "run.json")
    else:
        run = _run_all(plan, started)
    _clear(plan)
    print("\n".join(lines(run["sequence"])))
    logger.info("wrote %s", plan.out / "final")
    return run


def _run_all(plan: Plan, started: float) -> dict[str, Any]:
    """Every step that is not finished, and the result; what run.json then holds."""
    rows = [_measured(plan, row) for row in range(plan.first + 1)]
    verdict = None
    for number, domain in enumerate(plan.domains, 1):
        row = plan.first + number
        logger.info("domain %d of %d: %s", number, len(plan.domains), domain.name)
        verdict = _step(plan, number, domain)["verdict"]
        if not (plan.step(row) / "adapter").is_dir():
            stack(plan.options, _adapters(plan, number), plan.step(row) / "adapter")
        rows.append(_measured(plan, row))
    run = _run(plan, rows, verdict, time.perf_counter() - started)
    _finish(plan, run)
    return run


def _planned(options: TuneOptions) -> Plan:
    """Everything that can be refused before a model is loaded, and the domains with their held-out
    rows written.
    """
    out = Path(options.out)
    before: tuple[Domain, ...] = ()
    start: str | None = None
    if options.after:
        before, start, importance = earlier_of(options)
        options = replace(options, importance=options.importance or importance)
        if options.importance is None and options.method == "hold":  # the default beside --after
            logger.warning(
                "%s was tuned without importance, and none is given: nothing but a budget holds "
                "it; --importance FILE does",
                options.after,
            )
            options = replace(options, method="plain")
    _check(options)
    if options.importance and Path(options.importance).resolve() == (out / IMPORTANCE).resolve():
        raise OptionError(
            f"--importance '{options.importance}' lies where this run writes what its last step "
            "was held by; copy it to another place"
        )
    if options.resume:
        # What the earlier domains were measured on must not change for the later ones.
        check_resumed(options, out, measured=True)
    elif (out / "config.yaml").exists():
        if not options.overwrite:
            raise ValueError(
                f"'{out}' holds "
                f"{'a finished run' if (out / 'run.json').exists() else 'an unfinished run; go on with --resume'}; "
                "give another --out, or --overwrite"
            )
        for name in ("run.json", "steps", "data", "final", IMPORTANCE, INPUTS):
            discard(out / name)
    domains = named(options, out, taken=[domain.name for domain in before])
    given = _check_rows(options, before, domains, out)
    write_json(out / INPUTS, given)
    write_text(out / "config.yaml", yaml.safe_dump(as_dict(options), sort_keys=False))
    if options.importance:
        options = replace(options, importance=str(importance_path(options.importance)))
    return Plan(replace(options, push_to_hub=None, private=None), out, domains, before, start)


def _check(options: TuneOptions) -> None:
    parse_rule(options.consolidate or "sum")
    distributed.start(options.device)
    if distributed.world_size() > 1:
        raise OptionError(
            f"several domains are tuned in one process, found {distributed.world_size()}; start one "
            "process, or tune on all of the data at once"
        )
    for spec in (*several(options.data), *several(options.eval_data)):
        find_task(spec)  # a misspelt one is told before the rows of another are written
    if options.full or options.quantize != "none" or options.anchor == "recorded":
        wrong = (
            "--full"
            if options.full
            else "--anchor recorded"
            if options.anchor == "recorded"
            else f"--quantize {options.quantize}"
        )
        raise OptionError(
            f"{wrong} cannot be used with several domains or --after: each step stands on the "
            "updates before it, merged into the base, and the "
            "result is one LoRA adapter; leave it out"
        )
    methods = chosen(options)
    other = [
        name
        for name, method in methods.items()
        if method.adapter or method.save or name == "o-lora"
    ]
    if other:
        raise OptionError(
            f"--method {other[0]} cannot be used with several domains or --after: the steps' "
            "updates are added up as plain LoRA"
        )
    check_budget(options, list(methods))
    if options.final_rank is not None and options.budget:
        raise OptionError(
            "--final-rank changes the result after the budget was checked; leave out one of them"
        )
    given = several(options.eval_data)
    if given and len(given) != len(several(options.data)):
        raise OptionError(
            "--eval-data is given for each --data in its order: expected "
            f"{len(several(options.data))} of it, found {len(given)}"
        )


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
    given = {
        f"held-out rows of {domain.name}": fingerprint_rows(list(rows))
        for domain, rows in zip(every, held, strict=True)
    }
    given |= {
        f"rows of {domain.name}": fingerprint_rows(
            list(load_training_data(domain.train, split=domain.split or options.data_split))
        )
        for domain in domains
    }
    if options.general and options.general != "self":
        documents = load_documents(
            options.general,
            column=options.text_column,
            split=options.general_split,
            limit=options.limit,
        )
        given["general text"] = fingerprint_documents(documents)
    if options.resume:
        check_inputs(given, out)
    return given


def _adapters(plan: Plan, steps: int) -> list[str]:
    """The adapters on top of each other after so many steps of this command."""
    return [
        *([plan.start] if plan.start else []),
        *(str(plan.step(plan.first + i) / "final") for i in range(1, steps + 1)),
    ]


def _step(plan: Plan, number: int, domain: Domain) -> dict[str, Any]:
    """Tune on one domain, on top of everything before; what is in the step's run.json."""
    folder = plan.step(plan.first + number)
    if (folder / "run.json").exists():
        found: dict[str, Any] = read_json(folder / "run.json")
        return found
    stages = [Stage(plan.start, tuple(_held(one) for one in plan.before))] if plan.start else []
    stages += [
        Stage(adapter, (_held(one),))
        for adapter, one in zip(
            _adapters(plan, number - 1)[plan.first :], plan.domains, strict=False
        )
    ]
    earlier = Earlier(tuple(stages), plan.first, number / len(plan.domains))
    options = replace(
        plan.options,
        data=domain.train,
        eval_data=domain.held,
        eval_split=domain.held_split,
        importance=_importance(plan, number),
        out=str(folder),
        after=None,
        consolidate=None,
        final_rank=None,
        keep_all=False,
        resume=True,
        overwrite=False,
    )
    return tune(options, earlier=earlier)


def _held(domain: Domain) -> LearnedDomain:
    return LearnedDomain(domain.name, domain.held, domain.held_split)


def _importance(plan: Plan, number: int) -> str | None:
    """The file that a step is held by: the one given, from then on consolidated with the importance
    of the domain before.
    """
    row = plan.first + number
    so_far = plan.options.importance if number == 1 else _importance(plan, number - 1)
    if so_far is None or (number == 1 and not plan.start):
        return so_far
    path = plan.step(row) / IMPORTANCE
    if path.exists():
        return str(path)
    options, domain = plan.options, plan.all[len(plan.before) + number - 2]
    adapter = plan.start if number == 1 else str(plan.step(row - 1) / "adapter")
    model = lambda: load_model(options) if adapter is None else merged(load_model(options), adapter)
    return consolidate(so_far, domain.train, domain.split, model, options, path)


def _measured(plan: Plan, row: int) -> dict[str, Any]:
    """What is measured after a row's step."""
    adapter = (
        None
        if row == 0
        else plan.start
        if row == 1 and plan.start
        else str(plan.step(row) / "adapter")
    )
    return measured(plan.options, plan.all, adapter, plan.step(row) / "measured.json")


def _run(
    plan: Plan, rows: list[dict[str, Any]], verdict: str | None, seconds: float
) -> dict[str, Any]:
    """What run.json holds."""
    options, sequence = (
        plan.options,
        sequence_of(rows, [domain.name for domain in plan.all], plan.learned),
    )
    steps = []
    for number, domain in enumerate(plan.domains, 1):
        step = read_json(plan.step(plan.first + number) / "run.json")
        file = (step["importance"] or {}).get("file")
        merging = Importance.load(file).info.get("consolidated") if file else None
        steps.append(
            {
                "domain": domain.name,
                "budget": step["budget"],
                "verdict": step["verdict"],
                "energy": step["energy"],
                "data": step["data"],
                "train_seconds": step["train_seconds"],
                "importance": step["importance"],
                "consolidated": merging,
            }
        )
    before, after = (
        {key: row[key] for key in ("general", "tasks")} | {"domain": None}
        for row in (rows[0], rows[-1])
    )
    importance = (
        {"file": options.importance, "sha256": sha256_file(options.importance)}
        if options.importance
        else None
    )
    return {
        "configuration": as_dict(options),
        "environment": environment(),
        "method": (options.method or "plain").split(","),
        "sequence": {
            **sequence,
            "held": {domain.name: dataclasses.asdict(domain) for domain in plan.all},
            "steps": steps,
        },
        "importance": importance,
        "budget": steps[-1]["budget"],
        "verdict": verdict,
        "before": before,
        "after": after,
        **changes(before, after),
        "train_seconds": sum(step["train_seconds"] for step in steps),
        "seconds": seconds,
    }


def _finish(plan: Plan, run: dict[str, Any]) -> None:
    """The final adapter, the importance for a later step, run.json."""
    last, rank = plan.step(plan.first + len(plan.domains)), plan.options.final_rank
    error = stack(plan.options, [str(last / "adapter")], plan.out / "final", rank=rank)
    if rank is not None:
        smaller = measured(
            plan.options, plan.all, str(plan.out / "final"), plan.out / "steps" / "final.json"
        )
        losses = {name: smaller["domains"][name]["nats"] for name in run["sequence"]["domains"]}
        run["sequence"]["refactored"] = {
            "rank": rank,
            "error": error,
            "losses": losses,
            "general_nats": (smaller["general"] or {}).get("nats"),
        }
    held_by = run["sequence"]["steps"][-1]["importance"]
    if held_by is not None:
        with atomic_path(plan.out / IMPORTANCE) as temporary:
            shutil.copyfile(held_by["file"], temporary)
    write_json(plan.out / "run.json", run)


def _clear(plan: Plan) -> None:
    """Away with what only an unfinished run needs."""
    for row in range(plan.first + 1, plan.first + len(plan.domains) + 1):
        for name in (
            "final",
            "unscaled",
            "checkpoints",
            IMPORTANCE,
            "domain.safetensors",
            *(() if plan.options.keep_all else ("adapter",)),
        ):
            discard(plan.step(row) / name)
