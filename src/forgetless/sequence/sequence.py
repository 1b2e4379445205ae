"""tune() on several domains, one after the other: each is learned on top of what was learned
before, which is held from then on.

The steps themselves, and what each is held by, are told in steps.py. Here they are those of one
command: after each, general text and every domain are measured with the base and one plain PEFT
adapter, as anybody would load it. A budget covers general text, from the model that the command
started from, and every earlier domain, from when it was learned; by the end of step i of n, i/n of
it may be spent.

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
from dataclasses import replace
from pathlib import Path

from forgetless.evaluate.evaluate import changes
from forgetless.files.atomic import atomic_path
from forgetless.files.hub import ready
from forgetless.files.lock import only_writer
from forgetless.files.measured_json import MeasuredInTurn, MeasuredRow
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.run_json import ImportanceUsed, Refactored, SequenceRun, SequenceStep
from forgetless.files.schema import plain_of, read_record, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.importance.importance import Importance
from forgetless.model.stack import stack
from forgetless.options.option import as_dict
from forgetless.options.tune import TuneOptions
from forgetless.sequence.checks import Plan, planned
from forgetless.sequence.matrix import lines, measured, sequence_of
from forgetless.sequence.steps import IMPORTANCE, Steps, clear, take, updates
from forgetless.tune.result import push_result

logger = logging.getLogger("forgetless")


def tune_in_turn(options: TuneOptions) -> JsonObject:
    """Fine-tune on each of `options.data` in its turn; writes `options.out` and returns what is in
    its run.json.
    """
    repo = ready(options.push_to_hub, private=options.private) if options.push_to_hub else None
    with only_writer(options.out):
        run = _in_turn(options)
    if repo:
        push_result(repo, Path(options.out) / "final", run.verdict)
    return plain_of(run)


def _in_turn(options: TuneOptions) -> SequenceRun:
    started = time.perf_counter()
    plan = planned(options)
    if options.resume and (plan.out / "run.json").exists():
        run = read_record(plan.out / "run.json", SequenceRun)
    else:
        run = _take_all(plan, started)
    _clear(plan)
    assert run.sequence is not None
    print("\n".join(lines(run.sequence)))
    logger.info("wrote %s", plan.out / "final")
    return run


def _take_all(plan: Plan, started: float) -> SequenceRun:
    """Every step that is not finished, and the result; what run.json then holds."""
    steps = plan.steps()
    rows = [_measured_row(plan, steps, row) for row in range(plan.first + 1)]
    for number, step in enumerate(steps.each, 1):
        logger.info("domain %d of %d: %s", number, len(steps.each), step.domain.name)
        take(steps, number)
        rows.append(_measured_row(plan, steps, plan.first + number))
    run = _run(plan, rows, time.perf_counter() - started)
    return _finish(plan, run)


def _measured_row(plan: Plan, steps: Steps, row: int) -> MeasuredRow:
    """What is measured after a row's step; row 0 is the bare base."""
    adapters = updates(steps, row - plan.first) if row else ()
    path = plan.step(row) / "measured.json"
    return measured(plan.options, plan.all, adapters[0] if adapters else None, path)


def _run(plan: Plan, rows: list[MeasuredRow], seconds: float) -> SequenceRun:
    """What run.json holds."""
    options = plan.options
    steps = [_step_of(plan, number) for number in range(1, len(plan.domains) + 1)]
    before, after = (
        MeasuredInTurn(general=row.general, tasks=row.tasks, own=row.own)
        for row in (rows[0], rows[-1])
    )
    change = changes(before, after)
    importance = None
    if options.importance:
        importance = ImportanceUsed(options.importance, sha256_file(options.importance))
    sequence = sequence_of(
        rows,
        [domain.name for domain in plan.all],
        plan.learned,
        held={domain.name: dataclasses.asdict(domain) for domain in plan.all},
        steps=steps,
    )
    return SequenceRun(
        configuration=as_dict(options),
        environment=environment(),
        method=(options.method or "plain").split(","),
        sequence=sequence,
        importance=importance,
        budget=steps[-1].budget,
        verdict=steps[-1].verdict,
        before=before,
        after=after,
        forgetting=change.forgetting,
        learning=change.learning,
        general=change.general,
        train_seconds=sum(step.train_seconds or 0.0 for step in steps),
        seconds=seconds,
    )


def _step_of(plan: Plan, number: int) -> SequenceStep:
    """What run.json tells of one step: a part of the step's own run.json, and how what it was held
    by was consolidated.
    """
    step = read_record(plan.step(plan.first + number) / "run.json", SequenceStep)
    file = step.importance.file if step.importance else None
    consolidated = Importance.load(str(file)).info.get("consolidated") if file else None
    return replace(step, domain=plan.domains[number - 1].name, consolidated=consolidated)


def _finish(plan: Plan, run: SequenceRun) -> SequenceRun:
    """The final adapter, the importance for a later step, run.json; what that holds."""
    sequence, rank = run.sequence, plan.options.final_rank
    assert sequence is not None
    last, final = plan.step(plan.first + len(plan.domains)), plan.out / "final"
    error = stack(plan.options, [str(last / "adapter")], final, rank=rank)
    if rank is not None:
        path = plan.out / "steps" / "final.json"
        smaller = measured(plan.options, plan.all, str(final), path)
        refactored = Refactored(
            rank=rank,
            error=error,
            losses={name: smaller.domains[name].nats for name in sequence.domains},
            general_nats=smaller.general.nats if smaller.general else None,
        )
        run = replace(run, sequence=replace(sequence, refactored=refactored))
    held_by = sequence.steps[-1].importance
    if held_by is not None:
        with atomic_path(plan.out / IMPORTANCE) as temporary:
            shutil.copyfile(str(held_by.file), temporary)
    write_record(plan.out / "run.json", run)
    return run


def _clear(plan: Plan) -> None:
    """Remove what only an unfinished run needs."""
    adapter = () if plan.options.keep_all else ("adapter",)
    for step in plan.steps().each:
        clear(step, "final", IMPORTANCE, *adapter)
