"""Who keeps the budget of a run: a keeper that measures general text, or a predictor where there is
none; for `tune`, for a step of a sequence, and for anybody's trainer.

    check_budget(options, methods)                      # before anything is loaded
    keeper = of_run(options, model, tokenizer, inputs, encoded, importance)
    keeper = of_trainer(trainer, "1%", "general.jsonl", importance, names=None)

Costs the evaluations of the base model that baseline.py and learning.py name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from forgetless.budget.baseline import (
    PIECE,
    Baseline,
    Guard,
    answers_baseline,
    guard_of,
    measure_baseline,
)
from forgetless.budget.budget import Budget, parse
from forgetless.budget.keeper import Keeper
from forgetless.budget.learning import Learning, domain, fitting
from forgetless.budget.predicted import Predictor, check_calibrated
from forgetless.budget.probe import most_pieces
from forgetless.data.documents import Document, load_documents
from forgetless.data.domain import document_texts, encode_rows, load_training_data, row_text
from forgetless.data.duplicates import Overlap, overlap
from forgetless.data.encoding import Encoded
from forgetless.data.inputs import HeldOut, Inputs
from forgetless.data.own_text import OwnText, own_text
from forgetless.errors import OptionError
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.importance.importance import Importance
from forgetless.importance.recorded_on import check_measured
from forgetless.model.adapters import bare
from forgetless.model.loading import context_length
from forgetless.model.stages import Earlier, LearnedDomain, walk
from forgetless.model.update import Update
from forgetless.options.methods import METHODS
from forgetless.options.model import TextOptions
from forgetless.options.option import several
from forgetless.options.tune import TuneOptions

# Rows of an earlier domain that are measured at least, however long they are.
LEAST_ROWS = 100


def check_budget(options: TuneOptions, methods: Sequence[str]) -> None:
    """Raise OptionError for a budget that cannot be kept, before anything is loaded."""
    if not options.budget:
        return
    others = [name for name in methods if not METHODS[name].budget]
    if others:
        raise OptionError(
            "--budget sets the strength of the pull on importance and scales the update, which "
            f"--method {others[0]} does not leave to it; "
            f"expected {', '.join(name for name, row in METHODS.items() if row.budget)}"
        )
    parse(options.budget)
    if options.kl_weight == 0:
        raise OptionError(
            "--budget sets the weight of the divergence, from --kl-weight on, found 0; give a "
            "weight above 0, or leave kl out of --method"
        )
    if options.general:
        return
    if options.after or len(several(options.data)) > 1:
        raise OptionError(
            "--budget with several domains or --after is kept on held-out general text, found "
            "none; give --general TEXT"
        )
    if options.full or options.anchor == "recorded":
        found = "--full" if options.full else "--anchor recorded"
        raise OptionError(
            "--budget without --general is kept on a prediction for adapters, counted from the "
            f"base; found {found}; give --general TEXT"
        )
    if options.push_to_hub:
        raise OptionError(
            "--push-to-hub uploads what is known to keep its --budget, which without --general "
            "nothing is; give --general TEXT, or upload it by hand"
        )


def of_run(
    options: TuneOptions,
    model: nn.Module,
    tokenizer: Any,
    inputs: Inputs,
    encoded: Any,
    importance: Importance | None,
    baseline: Baseline | None = None,
    own: PairedAnswers | None = None,
) -> Keeper | Predictor:
    """The keeper of `tune`, made with the bare model that is to be trained; `baseline` where that
    is not what the rise counts from. Without general text, one that predicts.

    `own` are the model's own answers of the check part, where they have been measured already.
    """
    budget = parse(options.budget or "")
    if not options.general:
        calibration = check_calibrated(importance)
        learning = _learning(options, model, tokenizer, inputs.held_out, encoded)
        return Predictor(budget, calibration, learning)
    shared = trained_on(kept_on(inputs.held_out), inputs.training)
    baseline = baseline or _measured_baseline(
        options, model, tokenizer, inputs.held_out, encoded, budget, own
    )
    learning = _learning(options, model, tokenizer, inputs.held_out, encoded)
    return Keeper(baseline, learning, shared, _tokens_per_step(options, model, encoded))


def _tokens_per_step(options: TuneOptions, model: nn.Module, encoded: Any) -> float:
    """Tokens that an optimizer step trains on, all processes together; packed rows are full."""
    mean = sum(map(len, encoded["input_ids"])) / len(encoded)
    length = min(options.length, context_length(model)) if options.packing else mean
    return options.batch_size * options.accumulation * length


def on_earlier(
    options: TuneOptions,
    earlier: Earlier,
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    encoded: Any,
) -> tuple[nn.Module, Baseline | None]:
    """The model that a step of a sequence starts from, and with a budget the baseline: the general
    text measured where the command started, each earlier domain right after it was learned.
    """
    budget = parse(options.budget) if options.budget else None
    baseline: Baseline | None = None
    guards: list[Guard] = []
    for number, state in walk(model, earlier):
        model = state
        if budget is None:
            continue
        if number == earlier.reference:
            fraction = earlier.budget_fraction
            text = budget.text if fraction == 1 else f"{fraction:.0%} of {budget.text}"
            part = Budget(budget.nats * fraction, text)
            baseline = _measured_baseline(options, model, tokenizer, held_out, encoded, part)
        learned = earlier.stages[number - 1].domains if number else ()
        guards += [_guard(options, model, tokenizer, held) for held in learned]
    if baseline is None:
        return model, None
    baseline = replace(baseline, guards=tuple(guards))
    return model, baseline.moved_on() if len(earlier.stages) > earlier.reference else baseline


def _guard(options: TuneOptions, model: nn.Module, tokenizer: Any, held: LearnedDomain) -> Guard:
    """An earlier domain, measured on the model that has just learned it."""
    data = load_training_data(held.data, split=held.split, limit=options.limit)
    rows = encode_rows(data, tokenizer)
    return guard_of(model, held.name, *fitting(model, rows, held.data, least=LEAST_ROWS))


def kept_on(held_out: HeldOut) -> Sequence[Document]:
    """The general documents that a budget is kept on: none where it is what the model says."""
    return [] if held_out.own else held_out.general or []


def trained_on(documents: Sequence[Document], data: Any) -> Overlap:
    """Which general documents are in the rows that are trained on."""
    return overlap(document_texts(documents), [row_text(row) for row in data])


def _measured_baseline(
    options: TuneOptions,
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    encoded: Any,
    budget: Budget,
    check: PairedAnswers | None = None,
) -> Baseline:
    """What the model loses now on what the budget is kept on, with the pieces that a run of `tune`
    probes.
    """
    if held_out.own is not None:
        own, seed = held_out.own, options.seed
        return answers_baseline(model, tokenizer, own, budget, check=check, seed=seed)
    assert held_out.general is not None
    steps = options.max_steps
    if steps <= 0:
        rows_per_step = options.batch_size * options.accumulation
        steps = math.ceil(len(encoded) * options.epochs / rows_per_step)
    return measure_baseline(
        model,
        tokenizer,
        held_out.general,
        budget,
        pieces=most_pieces(steps),
        seed=options.seed,
    )


def _learning(
    options: TuneOptions, model: nn.Module, tokenizer: Any, held_out: HeldOut, encoded: Any
) -> Learning:
    """What learning is measured on: held-out domain data where given, else rows that are trained
    on, which is said.
    """
    if options.eval_data and held_out.domain is not None:
        return domain(model, encode_rows(held_out.domain, tokenizer), options.eval_data)
    rows = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in encoded]
    name = f"{options.data} (rows trained on: give --eval-data for held-out ones)"
    return domain(model, rows, name)


def of_trainer(
    trainer: Any,
    budget: str,
    general: str | None,
    importance: Importance,
    names: str | None,
    *,
    recorded_text: bool = False,
) -> Keeper | Predictor:
    """The keeper of anybody's trainer; `recorded_text`: also on what importance was recorded on.

    The base is measured with the update set to zero for as long, so an adapter may have been
    trained before.
    """
    limit = parse(budget)
    calibration = None if general else check_calibrated(importance)
    tokenizer = trainer.processing_class
    if not hasattr(tokenizer, "batch_decode"):
        raise OptionError(
            "a budget needs the tokenizer to read the general text: make the trainer with "
            "processing_class=tokenizer"
        )
    rows = _token_rows(trainer.train_dataset)
    own = own_text(TextOptions(), general)
    documents = load_documents(general) if general and not own else []
    check_measured(importance, documents, budget=True, allowed=recorded_text)
    training = trainer.model.training
    update = Update(trainer.model, names=names)
    try:
        update.scale(0)
        baseline = None
        if calibration is None:
            baseline = _baseline_of(trainer, own or documents, limit)
        learning = _learning_of(trainer, rows)
    finally:
        update.scale(1)
        trainer.model.train(training)
    if baseline is None:
        assert calibration is not None
        return Predictor(limit, calibration, learning)
    trained = tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True)
    shared = overlap(document_texts(documents), trained)
    # Of rows in another form than token ids, the length is not known.
    length = sum(len(ids) for ids, _ in rows) / len(rows) if rows else PIECE
    return Keeper(baseline, learning, shared, _rows_per_step(trainer) * length)


def _baseline_of(trainer: Any, kept_on: OwnText | Sequence[Document], budget: Budget) -> Baseline:
    """What the model of anybody's trainer loses on what its budget is kept on, its update at 0."""
    tokenizer, seed = trainer.processing_class, trainer.args.seed
    if isinstance(kept_on, OwnText):
        with bare(trainer.model) as base:
            return answers_baseline(base, tokenizer, kept_on, budget, seed=seed)
    pieces = most_pieces(_steps_of(trainer))
    return measure_baseline(trainer.model, tokenizer, kept_on, budget, pieces=pieces, seed=seed)


def _rows_per_step(trainer: Any) -> int:
    """Rows of one optimizer step of a trainer, all processes together."""
    args = trainer.args
    rows: int = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows


def _steps_of(trainer: Any) -> int:
    """Optimizer steps that a trainer is to take."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    rows = len(trainer.train_dataset) * trainer.args.num_train_epochs
    return math.ceil(rows / _rows_per_step(trainer))


def _learning_of(trainer: Any, trained: list[Encoded]) -> Learning | None:
    """What learning is measured on under anybody's trainer: its eval_dataset where that holds
    token ids, else the rows `trained`; None where neither does.
    """
    held_out = _token_rows(trainer.eval_dataset)
    if held_out:
        return domain(trainer.model, held_out, "the trainer's eval_dataset")
    if not trained:
        return None
    name = "rows trained on (give the trainer an eval_dataset for held-out ones)"
    return domain(trainer.model, trained, name)


def _token_rows(data: Any) -> list[Encoded]:
    """Rows of a trainer's data set that are token ids already, with what is scored in each; empty
    for anything else.
    """
    if isinstance(data, dict) or data is None or not hasattr(data, "__len__"):
        return []
    if not len(data) or "input_ids" not in data[0]:
        return []
    return [([int(token) for token in row["input_ids"]], _scored_tokens(row)) for row in data]


def _scored_tokens(row: Any) -> list[bool]:
    """Which tokens of a trainer's row are scored: those with a label, or those that TRL's masks
    allow, both of them where both are given.
    """
    if "labels" in row:
        return [int(label) != -100 for label in row["labels"]]
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]
    allowed = [all(bits) for bits in zip(*masks, strict=True)]
    return allowed or [True] * len(row["input_ids"])
