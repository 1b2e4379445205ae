"""What the base model loses on general text, kept for comparison: the control part, the check part,
and short pieces of the control part to probe with.

Losses of the base are measured once, before an adapter is there; everything later is paired with
them by document. Costs one evaluation of all general text at the start, and one more of the control
part to see how far documents move apart (`spread`). Windows do not overlap: half the cost of
`forgetless eval`.

    ledger = open_ledger(model, tokenizer, documents, parse("1%"))
    ledger.control.rise(tuned_model, error=0.05)         # Rise
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.budget.budget import Budget, planned_bound, split
from forgetless.data.documents import Document
from forgetless.data.encoding import Encoded
from forgetless.evaluate.paired import Part, content, encoded_each, measured
from forgetless.evaluate.rise import FEW_DOCUMENTS, Rise
from forgetless.files.schema import GENERAL
from forgetless.model.loading import context_length
from forgetless.model.update import Update

PIECE = 128  # tokens of a probed piece
SPREAD_PIECES = 48


@dataclass(frozen=True)
class Guard:
    """A domain learned before, whose loss may rise by no more than the budget either: its held-out
    rows in two parts, measured right after.
    """

    name: str
    control: Part
    check: Part


@dataclass(frozen=True)
class Ledger:
    """The two parts of the general text and the pieces of the control part to probe with, in a
    random order; in a sequence, the domains before.

    `moved`: the model that training starts from is no longer the one that was measured, so that an
    update of nothing has a rise of its own.
    """

    budget: Budget
    control: Part
    check: Part
    pieces: Part
    guards: tuple[Guard, ...] = ()
    moved: bool = False

    def offset(self, model: nn.Module) -> float:
        """The rise of the pieces now."""
        some = self.pieces.some(range(min(SPREAD_PIECES, len(self.pieces))))
        return float((some.losses(model) - some.nats).sum() / some.tokens.sum())

    def planned(self, model: nn.Module, *, error: float) -> tuple[Rise, float, str]:
        """(rise of the control part, the largest planned bound of any source, which source it is)."""
        rise = self.control.rise(model, error=error)
        bounds = {GENERAL: planned_bound(rise, len(self.check), error=error)}
        bounds |= {
            guard.name: planned_bound(
                guard.control.rise(model, error=error), len(guard.check), error=error
            )
            for guard in self.guards
        }
        worst = max(bounds, key=lambda name: bounds[name])
        return rise, bounds[worst], worst

    def checked(self, model: nn.Module, *, error: float) -> dict[str, Rise]:
        """The rise of every source's check part.

        The budget is kept where each is within it: no correction for their number is needed to say
        so.
        """
        return {
            GENERAL: self.check.rise(model, error=error),
            **{guard.name: guard.check.rise(model, error=error) for guard in self.guards},
        }

    def spread(self, model: nn.Module, update: Update, *, error: float) -> tuple[Rise, float]:
        """The interval of a random update that costs about the budget, on control documents, and
        its size; the update is as before afterwards.

        The rise of a random update grows with the square of its size, so the size is found in at
        most 6 small evaluations of a few pieces; then one of the control part, or two where the
        first missed the budget: on the lab's text it cost as little as 0.39 of one, whose interval
        is too narrow.
        """
        few = self.pieces.some(range(min(SPREAD_PIECES, len(self.pieces))))
        size = 1e-3
        try:
            for _ in range(6):
                update.randomise(size)
                nats = float((few.losses(model) - few.nats).sum() / few.tokens.sum())
                ratio = self.budget.nats / nats if nats > 0 else 64.0
                size *= min(8.0, max(0.125, math.sqrt(ratio)))
                if 0.8 < ratio < 1.25:
                    break
            for _ in range(2):
                update.randomise(size)
                found = self.control.rise(model, error=error)
                at, ratio = size, self.budget.nats / found.nats if found.nats > 0 else 64.0
                if 0.8 < ratio < 1.25:
                    break
                size *= min(8.0, max(0.125, math.sqrt(ratio)))
            return found, at
        finally:
            update.scale(1)


def open_ledger(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    budget: Budget,
    *,
    pieces: int = 4096,
    seed: int = 0,
) -> Ledger:
    """Split `documents`, encode them and measure the base.

    Raises ValueError where there are too few for any interval.

    `pieces` is how many pieces will be probed at most.
    """
    encoded, kept = encoded_each(documents, tokenizer)
    sides = split([content(document) for document in kept], [document.source for document in kept])
    if min(map(len, sides)) < FEW_DOCUMENTS:
        raise ValueError(
            f"the general text is too short for a budget: {len(kept)} documents with something "
            f"to predict, expected at least {2 * FEW_DOCUMENTS} "
            "different ones, since half of them are kept for the check; give more (a blank line "
            "ends a document of a .txt file)"
        )
    window = min(2048, context_length(model))
    control, check = (
        measured(model, [encoded[i] for i in side], [kept[i].source for i in side], window)
        for side in sides
    )
    cut = [
        (ids[i : i + PIECE], scored[i : i + PIECE])
        for ids, scored in control.encoded
        for i in range(0, len(ids), PIECE)
    ]
    cut = [piece for piece in cut if any(piece[1][1:])]
    random.Random(seed).shuffle(cut)
    return Ledger(
        budget,
        control,
        check,
        measured(model, cut[:pieces], [""] * len(cut[:pieces]), min(PIECE, window)),
    )


def guard_of(model: nn.Module, name: str, encoded: list[Encoded], window: int) -> Guard:
    """Held-out rows of a domain, split by their content and measured now.

    Raises ValueError where there are too few.
    """
    contents = [str(ids) for ids, _ in encoded]
    check_held(name, len(set(contents)))
    control, check = split(contents, [name] * len(encoded))
    parts = [
        measured(model, [encoded[i] for i in side], [name] * len(side), window)
        for side in (control, check)
    ]
    return Guard(name, *parts)


def check_held(name: str, rows: int) -> None:
    """Raise ValueError where a domain has too few different held-out rows to keep a budget on it."""
    if rows < 2 * FEW_DOCUMENTS:
        raise ValueError(
            f"domain {name} has {rows} different held-out rows; to keep a budget on it, at least "
            f"{2 * FEW_DOCUMENTS} are needed: give more with "
            "--eval-data, or a larger --limit"
        )
