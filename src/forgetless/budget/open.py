"""TODO budget.open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from forgetless.budget.baseline import PIECE, Ledger, guard_of, open_ledger
from forgetless.budget.budget import Budget, parse
from forgetless.budget.finish import Learning
from forgetless.budget.keeper import Keeper
from forgetless.budget.predicted import Predictor, check_calibrated
from forgetless.data.documents import Document, load_documents
from forgetless.data.duplicates import Overlap, overlap
from forgetless.data.encoding import Encoded
from forgetless.data.inputs import HeldOut, Inputs
from forgetless.data.tasks import encode_rows, load_training_data, row_text
from forgetless.errors import OptionError
from forgetless.evaluate.paired import measured
from forgetless.importance.importance import Importance
from forgetless.model.loading import context_length
from forgetless.model.stages import Earlier, walk
from forgetless.model.update import Update
from forgetless.options.methods import METHODS
from forgetless.options.option import several
from forgetless.options.tune import TuneOptions

LEARNING_TOKENS = 30_000  # of domain data, for the learning along the scan, and of earlier domains
LEAST_ROWS = 100  # of an earlier domain, however long they are


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
    if options.general == "self":
        raise OptionError(
            "--budget is kept on held-out general text, found --general self; give --general "
            "TEXT (not part of --data)"
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
    ledger: Ledger | None = None,
) -> Keeper | Predictor:
    """The keeper of `tune`, made with the bare model that is to be trained; `ledger` where that is
    not what the rise counts from. Without general text, one that predicts.
    """
    if not options.general:
        return Predictor(
            parse(options.budget or ""),
            check_calibrated(importance),
            _learning(options, model, tokenizer, inputs.held_out, encoded),
        )
    assert inputs.held_out.general is not None
    shared = trained_on(inputs.held_out.general, inputs.training)
    per_step = options.batch_size * options.accumulation
    mean = sum(map(len, encoded["input_ids"])) / len(encoded)
    length = min(options.length, context_length(model)) if options.packing else mean
    ledger = ledger or _opened(
        options, model, tokenizer, inputs.held_out, encoded, parse(options.budget or "")
    )
    learning = _learning(options, model, tokenizer, inputs.held_out, encoded)
    return Keeper(ledger, learning, shared, per_step * length)


def on_earlier(
    options: TuneOptions,
    earlier: Earlier,
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    encoded: Any,
) -> tuple[nn.Module, Ledger | None]:
    """The model that a step of a sequence starts from, and with a budget the ledger: the general
    text measured where the command started, each earlier domain right after it was learned.
    """
    budget = parse(options.budget) if options.budget else None
    ledger, guards = None, []
    for number, model in walk(model, earlier):
        if budget is None:
            continue
        if number == earlier.reference:
            text = budget.text if earlier.share == 1 else f"{earlier.share:.0%} of {budget.text}"
            ledger = _opened(
                options,
                model,
                tokenizer,
                held_out,
                encoded,
                Budget(budget.nats * earlier.share, text),
            )
        for held in earlier.stages[number - 1].held if number else ():
            rows = encode_rows(
                load_training_data(held.data, split=held.split, limit=options.limit), tokenizer
            )
            guards.append(
                guard_of(model, held.name, *_fitting(model, rows, held.data, least=LEAST_ROWS))
            )
    return model, None if ledger is None else replace(
        ledger, guards=tuple(guards), moved=len(earlier.stages) > earlier.reference
    )


def trained_on(documents: Sequence[Document], data: Any) -> Overlap:
    """Which general documents are in the rows that are trained on."""
    return overlap(
        [row_text(asdict(document)) for document in documents], [row_text(row) for row in data]
    )


def _opened(
    options: TuneOptions,
    model: nn.Module,
    tokenizer: Any,
    held_out: HeldOut,
    encoded: Any,
    budget: Budget,
) -> Ledger:
    assert held_out.general is not None
    steps = (
        options.max_steps
        if options.max_steps > 0
        else math.ceil(len(encoded) * options.epochs / (options.batch_size * options.accumulation))
    )
    return open_ledger(
        model,
        tokenizer,
        held_out.general,
        budget,
        pieces=most_pieces(steps),
        seed=options.seed,
    )


def of_trainer(
    trainer: Any, budget: str, general: str | None, importance: Importance, names: str | None
) -> Keeper | Predictor:
    """The keeper of anybody's trainer.

    The base is measured with the update set to zero for as long, so an adapter may have been
    trained before.
    """
    limit, calibration = parse(budget), None if general else check_calibrated(importance)
    tokenizer, args = trainer.processing_class, trainer.args
    if not hasattr(tokenizer, "batch_decode"):
        raise OptionError(
            "a budget needs the tokenizer to read the general text: make the trainer with "
            "processing_class=tokenizer"
        )
    rows = _token_rows(trainer.train_dataset)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = (
        args.max_steps
        if args.max_steps > 0
        else math.ceil(len(trainer.train_dataset) * args.num_train_epochs / per_step)
    )
    documents = load_documents(general) if general else []
    held = _token_rows(trainer.eval_dataset) or rows
    training, update = trainer.model.training, Update(trainer.model, names=names)
    try:
        update.scale(0)
        ledger = (
            None
            if calibration
            else open_ledger(
                trainer.model,
                tokenizer,
                documents,
                limit,
                pieces=most_pieces(steps),
                seed=args.seed,
            )
        )
        name = (
            "the trainer's eval_dataset"
            if held is not rows
            else "rows trained on (give the trainer an eval_dataset for held-out ones)"
        )
        learning = domain(trainer.model, held, name) if held else None
    finally:
        update.scale(1)
        trainer.model.train(training)
    if ledger is None:
        assert calibration is not None
        return Predictor(limit, calibration, learning)
    shared = overlap(
        [row_text(asdict(document)) for document in documents],
        tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True),
    )
    length = (
        sum(len(ids) for ids, _ in rows) / len(rows) if rows else PIECE
    )  # of rows in another form nothing is known
    return Keeper(ledger, learning, shared, per_step * length)


def most_pieces(steps: int) -> int:
    """Pieces that a run of so many steps can probe at most."""
    return 64 * steps // 5 + 64


def _token_rows(data: Any) -> list[Encoded]:
    """Rows of a trainer's data set that are token ids already, with what is scored in each; empty
    for anything else.
    """
    if (
        isinstance(data, dict)
        or data is None
        or not hasattr(data, "__len__")
        or not len(data)
        or "input_ids" not in data[0]
    ):
        return []
    rows = []
    for row in data:
        ids = [int(token) for token in row["input_ids"]]
        masks = [
            row[name] for name in ("completion_mask", "assistant_masks") if name in row
        ]  # of TRL; both given, both must allow it
        scored = (
            [int(label) != -100 for label in row["labels"]]
            if "labels" in row
            else [all(bits) for bits in zip(*masks, strict=True)] or [True] * len(ids)
        )
        rows.append((ids, scored))
    return rows


def _learning(
    options: TuneOptions, model: nn.Module, tokenizer: Any, held_out: HeldOut, encoded: Any
) -> Learning:
    """What learning is measured on: held-out domain data where given, else rows that are trained
    on, said so.
    """
    if options.eval_data:
        rows = encode_rows(held_out.domain, tokenizer)
        name = options.eval_data
    else:
        rows = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in encoded]
        name = f"{options.data} (rows trained on: give --eval-data for held-out ones)"
    return domain(model, rows, name)


def domain(model: nn.Module, rows: list[Encoded], name: str) -> Learning:
    """Domain data of at most LEARNING_TOKENS tokens, evenly taken from `rows`, measured on the
    base. A row too long for the window loses its beginning.
    """
    rows, window = _fitting(model, rows, name)
    if len(rows) < 2:
        raise ValueError(
            f"{name}: learning is measured on at least two rows of domain data, found "
            f"{len(rows)}; give more"
        )
    return Learning(measured(model, rows, ["domain"] * len(rows), window), name)


def _fitting(
    model: nn.Module, rows: list[Encoded], name: str, *, least: int = 2
) -> tuple[list[Encoded], int]:
    """Rows of about LEARNING_TOKENS tokens, but at least `least` of them, evenly taken and cut to
    the window; and the window.
    """
    window = min(2048, context_length(model))
    rows = [(ids[-window:], scored[-window:]) for ids, scored in rows]
    rows = [row for row in rows if any(row[1][1:])]
    if not rows:
        raise ValueError(
            f"{name}: no row has a token to score; expected text of at least two tokens, "
            "completions, or chats with assistant turns"
        )
    every = math.ceil(sum(len(ids) for ids, _ in rows) / LEARNING_TOKENS)
    return rows[:: max(1, min(every, len(rows) // least))], window
