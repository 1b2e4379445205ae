"""The end of a run of tune: the update finished and saved, run.json and the model card written, the
result pushed to the Hub.

    finished = finish(trained, methods, start.keeper)
    run = make_run(start, trained, finished, after, ...)
    write_result(run, options)

In several processes all of them finish and measure, and the first one writes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.budget.keeper import Keeper
from forgetless.budget.predicted import Predictor
from forgetless.data.inputs import Inputs
from forgetless.evaluate.conversations import Behaved, run_keys
from forgetless.evaluate.evaluate import changes, changes_table
from forgetless.evaluate.paired_answers import divergence_by_kind
from forgetless.evaluate.paired_scores import with_score_changes
from forgetless.files.budget_json import BudgetReport
from forgetless.files.hub import push_folder, ready
from forgetless.files.measured_json import Measured
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.run_json import ImportanceUsed, LogEntry, Run, TrainedData, TunedRun
from forgetless.files.schema import Text, as_record, write_record
from forgetless.methods.method import MethodSteps, Setup
from forgetless.model import distributed
from forgetless.model.loading import save_whole
from forgetless.options.option import as_dict
from forgetless.options.tune import TuneOptions
from forgetless.report.behaviours import behaviours_in_words
from forgetless.report.budget import sentences
from forgetless.report.cards import write_card
from forgetless.report.outcome import next_commands, outcome
from forgetless.tune.base import Start, importance_name
from forgetless.tune.moved import moved
from forgetless.tune.rows import Rows

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class TrainedModel:
    """What training left.

    `setup` holds the importance that the model was held by. `prepare_seconds` are what the methods
    took before training: text sampled, curvature, decompositions, steps on general text.
    """

    model: nn.Module
    trainer: Any
    setup: Setup
    prepare_seconds: float
    train_seconds: float


@dataclass(frozen=True)
class Finished:
    """What finishing the update gave: a note of each method that has one, the budget's report."""

    notes: dict[str, dict[str, float]]
    budget: BudgetReport | None


def finish(
    trained: TrainedModel, methods: Mapping[str, MethodSteps], keeper: Keeper | Predictor | None
) -> Finished:
    """Let the methods and the budget change the trained update, and save it to DIR/final.

    With a budget the update as it was trained is saved to DIR/unscaled first.
    """
    setup, model = trained.setup, trained.model
    out, tokenizer = Path(setup.options.out), setup.tokenizer
    notes = {name: method.finish(setup, model) for name, method in methods.items() if method.finish}
    budget = None
    if keeper is not None:
        if distributed.first():
            save_whole(model, tokenizer, out / "unscaled")
        budget = keeper.finish(trained.trainer)
    own = [functools.partial(method.save, setup) for method in methods.values() if method.save]
    if distributed.first():
        save_whole(model, tokenizer, out / "final", own[0] if own else None)
    return Finished(notes, budget)


def make_run(
    start: Start,
    trained: TrainedModel,
    finished: Finished,
    after: Measured,
    *,
    behaved: Behaved | None,
    methods: Mapping[str, MethodSteps],
    inputs: Inputs,
    rows: Rows,
    file: Path | None,
) -> TunedRun:
    """What run.json holds.

    `after` are the numbers of the finished model, `behaved` how it behaves beside its base, and
    `file` is where the importance lies.
    """
    setup, model, log = trained.setup, trained.model, trained.trainer.state.log_history
    options, before = setup.options, start.setup.before
    assert before is not None
    after = with_score_changes(before, after)
    change = changes(before, after)
    return TunedRun(
        configuration=as_dict(options),
        environment=environment(str(next(model.parameters()).device)),
        data=_trained_data(options, inputs, rows),
        processes=distributed.world_size(),
        method=list(methods),
        finished=finished.notes,
        budget=finished.budget,
        verdict=None if finished.budget is None else finished.budget.verdict,
        replay=start.replayed,
        importance=_importance_used(options, file),
        before=before,
        after=after,
        forgetting=change.forgetting,
        learning=change.learning,
        general=change.general,
        divergence_by_kind=divergence_by_kind(after.own),
        **run_keys(behaved),
        energy=last_logged(log, "energy"),
        moved=moved(model, setup.importance, setup.layers),
        train_seconds=trained.train_seconds,
        prepare_seconds=trained.prepare_seconds,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        log=log,
    )


def _importance_used(options: TuneOptions, file: Path | None) -> ImportanceUsed | None:
    if file is None:
        return None
    return ImportanceUsed(importance_name(options, file), sha256_file(file))


def _trained_data(options: TuneOptions, inputs: Inputs, rows: Rows) -> TrainedData:
    return TrainedData(
        source=options.data,
        rows=len(inputs.training),
        rows_trained=len(rows.training),
        sha256=inputs.hashes["training data"],
    )


def write_result(run: TunedRun, options: TuneOptions, *, can_chat: bool, part: bool) -> None:
    """Write the model card and run.json, and print what was learned and lost.

    `part`: the run is a step of a sequence, which is gone on from.
    """
    out = Path(options.out)
    if distributed.first():
        what = "model" if options.full else "adapter"
        write_card(out / "final", "tune", as_record(run, Run), what=what)
        write_record(out / "run.json", run)
    distributed.barrier()
    if not distributed.first():
        return
    logger.info("wrote %s in %.0f s", out / "final", run.train_seconds)
    if run.before is not None and run.before.tasks:
        print(changes_table(Measured(tasks=run.before.tasks), run.after))
    if run.behaviours is not None:
        print(behaviours_in_words(run))
    if run.budget is not None:
        print("\n".join(sentences(run.budget)))
    print(outcome(run))
    if not part:
        print(next_commands(out, adapter=not options.full, can_chat=can_chat))


def repository_of(options: TuneOptions) -> str | None:
    """The Hub repository that the result goes to, made ready where it is new; None without one, and
    in all processes but the first.
    """
    if not options.push_to_hub or not distributed.first():
        return None
    return ready(options.push_to_hub, private=options.private)


def push_result(repository: str, folder: Path, verdict: Text | None) -> None:
    """Upload the result, unless it was to keep a budget and is not known to."""
    if verdict not in (None, "met"):
        logger.warning(
            "the budget is %s: nothing is pushed; where you want it all the same: hf upload %s %s",
            verdict,
            repository,
            folder,
        )
        return
    push_folder(folder, repository, commit_message="Upload with forgetless tune")


def last_logged(log: list[LogEntry], key: str) -> float | None:
    """The newest value of `key` in the trainer's log; None where it never stood there."""
    return next((entry[key] for entry in reversed(log) if key in entry), None)
