"""The budget of one training run, from the first look at the general text to the verdict: what `tune --budget` adds to training.

before training   general text split and measured on the base, overlap with the training data warned of, budgets that it cannot show refused
during            the probe sets the strength
after             the finish scales the update to the most learning that keeps the budget, and checks it
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from holdfast.budget import Controller, check_reach, parse
from holdfast.callback import hold
from holdfast.config import STRENGTHS, OptionError, TuneOptions
from holdfast.finish import EACH, Learning, keep_budget, ways_of
from holdfast.importance.container import Importance
from holdfast.ledger import PIECE, content, measured, open_ledger
from holdfast.models import context_length
from holdfast.overlap import overlap
from holdfast.probe import Probe, plan
from holdfast.tasks import encode_rows, load_training_data
from holdfast.texts import Encoded, load_documents
from holdfast.update import Update

logger = logging.getLogger("holdfast")
LEARNING_TOKENS = 30_000  # of domain data, for the learning along the scan


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
    if not options.general or options.general == "self":
        raise OptionError(f"--budget is kept on held-out general text, found --general {options.general}; give --general TEXT (not part of --data)")


class Keeper:
    """Keeps the budget of one run. Made with the bare base model, then `bind` before training and `finish` after it."""

    def __init__(self, options: TuneOptions, model: nn.Module, tokenizer: Any, data: Any, encoded: Any):
        self.options, self.budget = options, parse(options.budget or "")
        documents = load_documents(options.general or "", column=options.text_column, split=options.general_split, limit=options.limit)
        shared = overlap([content(document) for document in documents], [_row_text(row) for row in data])
        if said := shared.describe():
            logger.warning("%s", said)
        self.overlap = {"exact": len(shared.exact), "near": len(shared.near), "documents": shared.documents}
        per_step = options.batch_size * options.accumulation
        steps = options.max_steps if options.max_steps > 0 else math.ceil(len(encoded) * options.epochs / per_step)
        mean = sum(map(len, encoded["input_ids"])) / len(encoded)
        length = min(options.length, context_length(model)) if options.packing else mean
        pieces = 64 * steps // 5 + 64
        self.ledger = open_ledger(model, tokenizer, documents, self.budget, pieces=pieces, seed=options.seed)
        piece = min(PIECE, float(self.ledger.pieces.tokens.mean()) + 1)
        self.every, self.count = plan(per_step * length, piece)
        self.learning = _learning(options, model, tokenizer, encoded)

    def bind(self, trainer: Any, importance: Importance, how: Any) -> None:
        """Refuse what the text cannot show, then add penalty and probe to the trainer."""
        options = self.options
        names = options.targets if options.full else None
        self.update = Update(trainer.model, names=names)
        self.shrinkable = importance if options.importance and not options.full else None  # uniform importance would only scale
        spread = self.ledger.spread(trainer.model, self.update, error=EACH)
        check_reach(spread, len(self.ledger.check), self.budget, error=EACH)
        start = options.strength or STRENGTHS.get(importance.info.get("estimator", "?"))
        penalty = hold(trainer, importance, strength=0.0, layers=how, anchor=options.anchor, names=names).penalty
        self.probe = Probe(Controller(self.budget.nats, start), penalty, self.ledger.pieces, every=self.every, count=self.count)
        trainer.callback_handler.callbacks.insert(0, self.probe)
        logger.info("budget %s (%.4g nats): %d control and %d check documents; %d pieces probed every %d steps", self.budget.text, self.budget.nats,
                    len(self.ledger.control), len(self.ledger.check), self.probe.count, self.every)  # fmt: skip

    def finish(self, trainer: Any) -> dict[str, Any]:
        """Make the model's update fit the budget and check it; what run.json holds under `budget`."""
        if not self.probe.controller.trajectory and trainer.state.global_step >= self.every:
            self.probe.restore(trainer.state)  # a finished training that was only loaded
        self.update.keep()
        report = keep_budget(self.ledger, trainer.model, ways_of(self.update, self.shrinkable), self.learning)
        report["trajectory"] = self.probe.controller.trajectory
        report["probe"] = {"every": self.every, "pieces": self.probe.count, "seconds": self.probe.seconds, "train_seconds": self.probe.total_seconds}
        report["overlap"] = self.overlap
        return report


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
    window = min(2048, context_length(model))
    rows = [(ids[-window:], scored[-window:]) for ids, scored in rows]
    rows = [row for row in rows if any(row[1][1:])]
    if not rows:
        raise ValueError(f"{name}: no row has a token to score; expected text of at least two tokens, completions, or chats with assistant turns")
    rows = rows[:: max(1, math.ceil(sum(len(ids) for ids, _ in rows) / LEARNING_TOKENS))]
    return Learning(measured(model, rows, ["domain"] * len(rows), window), name)


def _row_text(row: dict[str, Any]) -> str:
    if "messages" in row:
        return " ".join(turn["content"] for turn in row["messages"])
    return row["text"] if "text" in row else row["prompt"] + row["completion"]
