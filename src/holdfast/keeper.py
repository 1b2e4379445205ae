"""The budget of one training run, from the first look at the general text to the verdict: what `tune --budget` and `hold(trainer, budget=...)` add to it.

before training   general text split and measured on the base, overlap with the training data warned of, budgets that it cannot show refused
during            the probe sets the strength
after             the finish scales the update to the most learning that keeps the budget, and checks it
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import nn

from holdfast.budget import Budget, Controller, Interval, check_reach, parse
from holdfast.callback import HoldfastCallback, hold
from holdfast.config import IN_NATS, STRENGTHS, TuneOptions
from holdfast.earlier import Earlier, walk
from holdfast.finish import EACH, Learning, keep_budget, ways_of
from holdfast.importance.container import Importance
from holdfast.ledger import PIECE, Ledger, guard_of, measured, open_ledger
from holdfast.models import context_length
from holdfast.options import OptionError, several
from holdfast.overlap import Overlap, overlap
from holdfast.penalty.pull import Penalty
from holdfast.prediction import Predictor, check_calibrated
from holdfast.probe import Probe, Rolling, plan
from holdfast.tasks import encode_rows, load_training_data, row_text
from holdfast.texts import Document, Encoded, fingerprint_rows, load_documents
from holdfast.update import Update
from holdfast.weights import FullWeight

logger = logging.getLogger("holdfast")
LEARNING_TOKENS = 30_000  # of domain data, for the learning along the scan, and of earlier domains
LEAST_ROWS = 100  # of an earlier domain, however long they are


HELD = ("plain", "holdfast", "kl", "replay", "rslora", "full", "small-lr")  # methods that leave the penalty and the finish to the keeper


def check_budget(options: TuneOptions, methods: Sequence[str]) -> None:
    """Raise OptionError for a budget that cannot be kept, before anything is loaded."""
    if not options.budget:
        return
    others = [name for name in methods if name not in HELD]
    if others:
        raise OptionError(f"--budget sets the strength of the pull on importance and scales the update, which --method {others[0]} does not leave to it; "
                          f"expected {', '.join(HELD)}")  # fmt: skip
    parse(options.budget)
    if options.general == "self":
        raise OptionError("--budget is kept on held-out general text, found --general self; give --general TEXT (not part of --data)")
    if options.general:
        return
    if options.after or len(several(options.data)) > 1:
        raise OptionError("--budget with several domains or --after is kept on held-out general text, found none; give --general TEXT")
    if options.full or options.anchor == "recorded":
        found = "--full" if options.full else "--anchor recorded"
        raise OptionError(f"--budget without --general is kept on a prediction for adapters, counted from the base; found {found}; give --general TEXT")
    if options.push_to_hub:
        raise OptionError(
            "--push-to-hub uploads what is known to keep its --budget, which without --general nothing is; give --general TEXT, or upload it by hand"
        )


class Keeper:
    """Keeps the budget of one run. Made while the model carries no update, then `bind` before training and `finish` after it."""

    def __init__(self, ledger: Ledger, learning: Learning | None, shared: Overlap, tokens_per_step: float):
        self.ledger, self.learning, self.budget = ledger, learning, ledger.budget
        if said := shared.describe():
            logger.warning("%s", said)
        self.overlap = {"exact": len(shared.exact), "near": len(shared.near), "documents": shared.documents}
        piece = min(PIECE, float(ledger.pieces.tokens.mean()) + 1)
        rows = [float(np.mean([len(ids) for ids, _ in guard.control.encoded])) for guard in ledger.guards]
        self.every, self.count = plan(tokens_per_step, piece + (sum(rows) / len(rows) if rows else 0.0))  # of both as many, together

    def bind(self, trainer: Any, importance: Importance, *, start: float | None, layers: Any, anchor: str, names: str | None,
             offload: bool = False) -> HoldfastCallback:  # fmt: skip
        """Refuse what the text cannot show, then add penalty and probe to the trainer. `start`: the strength to begin at; None: what suits the importance."""
        self.update = Update(trainer.model, names=names)
        only_scales = importance.info.get("estimator") == "uniform" or any(isinstance(weight, FullWeight) for weight in self.update.weights)
        self.shrinkable = None if only_scales else importance
        spread: tuple[Interval, float] | None = None
        if not self.ledger.moved:  # a random update's rise is measured from the model that training starts from
            spread = self.ledger.spread(trainer.model, self.update, error=EACH)
            check_reach(spread[0], len(self.ledger.check), self.budget, error=EACH)
        callback = hold(trainer, importance, strength=0.0, layers=layers, anchor=anchor, names=names, offload=offload)
        unit = 1.0 if importance.info.get("estimator") in IN_NATS else self._unit(callback.penalty, spread)
        start = start or (STRENGTHS[str(importance.info["estimator"])] if importance.info.get("estimator") in IN_NATS else None)
        guards = [Rolling(guard.control, trainer.model) for guard in self.ledger.guards]
        offset = self.ledger.offset(trainer.model) if self.ledger.moved else 0.0
        self.probe = Probe(Controller(self.budget.nats, start, unit), callback.penalty, self.ledger.pieces, every=self.every, count=self.count, guards=guards,
                           offset=offset)  # fmt: skip
        trainer.callback_handler.callbacks.insert(0, self.probe)
        callback.finishing = functools.partial(self.finish, trainer)
        logger.info("budget %s (%.4g nats): %d control and %d check documents; %d pieces probed every %d steps", self.budget.text, self.budget.nats,
                    len(self.ledger.control), len(self.ledger.check), self.probe.count, self.every)  # fmt: skip
        return callback

    def _unit(self, penalty: Penalty, spread: tuple[Interval, float] | None) -> float | None:
        """Nats of general loss that a unit of energy costs, by the random update of which both were measured; None where there is none."""
        if spread is None or spread[0].nats <= 0:
            return None
        try:
            self.update.randomise(spread[1])
            energy = penalty.energy(together=True)
        finally:
            self.update.scale(1)
        return spread[0].nats / energy if energy > 0 else None

    def finish(self, trainer: Any) -> dict[str, Any]:
        """Make the model's update fit the budget and check it; what run.json holds under `budget`."""
        self.update.keep()
        report = keep_budget(self.ledger, trainer.model, ways_of(self.update, self.shrinkable), self.learning)
        return {**report, **self.probe.history(trainer.state), "overlap": self.overlap}


def of_run(options: TuneOptions, model: nn.Module, tokenizer: Any, data: Any, encoded: Any, importance: Importance | None,
           ledger: Ledger | None = None) -> Keeper | Predictor:  # fmt: skip
    """The keeper of `tune`, made with the bare model that is to be trained; `ledger` where that is not what the rise counts from. Without general text, one
    that predicts."""
    if not options.general:
        return Predictor(parse(options.budget or ""), check_calibrated(importance), _learning(options, model, tokenizer, encoded))
    documents = _documents(options)
    shared = trained_on(documents, data)
    per_step = options.batch_size * options.accumulation
    mean = sum(map(len, encoded["input_ids"])) / len(encoded)
    length = min(options.length, context_length(model)) if options.packing else mean
    ledger = ledger or _opened(options, model, tokenizer, encoded, parse(options.budget or ""))
    return Keeper(ledger, _learning(options, model, tokenizer, encoded), shared, per_step * length)


def on_earlier(options: TuneOptions, earlier: Earlier, model: nn.Module, tokenizer: Any, encoded: Any) -> tuple[nn.Module, Ledger | None]:
    """The model that a step of a sequence starts from, and with a budget the ledger: the general text measured where the command started, each earlier domain
    right after it was learned."""
    budget = parse(options.budget) if options.budget else None
    ledger, guards = None, []
    for number, model in walk(model, earlier):  # noqa: B020 - the same model, changed in place
        if budget is None:
            continue
        if number == earlier.reference:
            text = budget.text if earlier.share == 1 else f"{earlier.share:.0%} of {budget.text}"
            ledger = _opened(options, model, tokenizer, encoded, Budget(budget.nats * earlier.share, text))
        for held in earlier.stages[number - 1].held if number else ():
            rows = encode_rows(load_training_data(held.data, split=held.split, limit=options.limit), tokenizer)
            guards.append(guard_of(model, held.name, *_fitting(model, rows, held.data, least=LEAST_ROWS)))
    return model, None if ledger is None else replace(ledger, guards=tuple(guards), moved=len(earlier.stages) > earlier.reference)


def trained_on(documents: Sequence[Document], data: Any) -> Overlap:
    """Which general documents are in the rows that are trained on."""
    return overlap([row_text(asdict(document)) for document in documents], [row_text(row) for row in data])


def _documents(options: TuneOptions) -> list[Document]:
    return load_documents(options.general or "", column=options.text_column, split=options.general_split, limit=options.limit)


def _opened(options: TuneOptions, model: nn.Module, tokenizer: Any, encoded: Any, budget: Budget) -> Ledger:
    steps = options.max_steps if options.max_steps > 0 else math.ceil(len(encoded) * options.epochs / (options.batch_size * options.accumulation))
    return open_ledger(model, tokenizer, _documents(options), budget, pieces=most_pieces(steps), seed=options.seed)


def of_trainer(trainer: Any, budget: str, general: str | None, importance: Importance, names: str | None) -> Keeper | Predictor:
    """The keeper of anybody's trainer. The base is measured with the update set to zero for as long, so an adapter may have been trained before."""
    limit, calibration = parse(budget), None if general else check_calibrated(importance)
    tokenizer, args = trainer.processing_class, trainer.args
    if not hasattr(tokenizer, "batch_decode"):
        raise OptionError("a budget needs the tokenizer to read the general text: make the trainer with processing_class=tokenizer")
    rows = _token_rows(trainer.train_dataset)
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(len(trainer.train_dataset) * args.num_train_epochs / per_step)
    documents = load_documents(general) if general else []
    held = _token_rows(trainer.eval_dataset) or rows
    training, update = trainer.model.training, Update(trainer.model, names=names)
    try:
        update.scale(0)
        ledger = None if calibration else open_ledger(trainer.model, tokenizer, documents, limit, pieces=most_pieces(steps), seed=args.seed)
        name = "the trainer's eval_dataset" if held is not rows else "rows trained on (give the trainer an eval_dataset for held-out ones)"
        learning = domain(trainer.model, held, name) if held else None
    finally:
        update.scale(1)
        trainer.model.train(training)
    if ledger is None:
        assert calibration is not None
        return Predictor(limit, calibration, learning)
    shared = overlap([row_text(asdict(document)) for document in documents], tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True))
    length = sum(len(ids) for ids, _ in rows) / len(rows) if rows else PIECE  # of rows in another form nothing is known
    return Keeper(ledger, learning, shared, per_step * length)


def most_pieces(steps: int) -> int:
    """Pieces that a run of so many steps can probe at most."""
    return 64 * steps // 5 + 64


def _token_rows(data: Any) -> list[Encoded]:
    """Rows of a trainer's data set that are token ids already, with what is scored in each; empty for anything else."""
    if isinstance(data, dict) or data is None or not hasattr(data, "__len__") or not len(data) or "input_ids" not in data[0]:
        return []
    rows = []
    for row in data:
        ids = [int(token) for token in row["input_ids"]]
        masks = [row[name] for name in ("completion_mask", "assistant_masks") if name in row]  # of TRL; both given, both must allow it
        scored = [int(label) != -100 for label in row["labels"]] if "labels" in row else [all(bits) for bits in zip(*masks, strict=True)] or [True] * len(ids)
        rows.append((ids, scored))
    return rows


def hash_of_general(options: TuneOptions) -> str:
    return fingerprint_rows([asdict(document) for document in _documents(options)])


def hashes(options: TuneOptions) -> dict[str, str]:
    """sha256 of the general text that a budget is kept on and of the rows that learning is measured by: a resumed run needs the same."""
    found = {"general text": hash_of_general(options)} if options.general else {}
    if options.eval_data:
        held = load_training_data(options.eval_data, split=options.eval_split, limit=options.limit)
        found["held-out rows"] = fingerprint_rows(list(held))
    return found


def _learning(options: TuneOptions, model: nn.Module, tokenizer: Any, encoded: Any) -> Learning:
    """What learning is measured on: held-out domain data where given, else rows that are trained on, said so."""
    if options.eval_data:
        rows = encode_rows(load_training_data(options.eval_data, split=options.eval_split, limit=options.limit), tokenizer)
        name = options.eval_data
    else:
        rows = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in encoded]
        name = f"{options.data} (rows trained on: give --eval-data for held-out ones)"
    return domain(model, rows, name)


def domain(model: nn.Module, rows: list[Encoded], name: str) -> Learning:
    """Domain data of at most LEARNING_TOKENS tokens, evenly taken from `rows`, measured on the base. A row too long for the window loses its beginning."""
    rows, window = _fitting(model, rows, name)
    if len(rows) < 2:
        raise ValueError(f"{name}: learning is measured on at least two rows of domain data, found {len(rows)}; give more")
    return Learning(measured(model, rows, ["domain"] * len(rows), window), name)


def _fitting(model: nn.Module, rows: list[Encoded], name: str, *, least: int = 2) -> tuple[list[Encoded], int]:
    """Rows of about LEARNING_TOKENS tokens, but at least `least` of them, evenly taken and cut to the window; and the window."""
    window = min(2048, context_length(model))
    rows = [(ids[-window:], scored[-window:]) for ids, scored in rows]
    rows = [row for row in rows if any(row[1][1:])]
    if not rows:
        raise ValueError(f"{name}: no row has a token to score; expected text of at least two tokens, completions, or chats with assistant turns")
    every = math.ceil(sum(len(ids) for ids, _ in rows) / LEARNING_TOKENS)
    return rows[:: max(1, min(every, len(rows) // least))], window
