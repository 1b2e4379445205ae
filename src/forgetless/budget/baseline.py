"""What the base model loses on general text, kept for comparison: the control part, the check part,
and short pieces of the control part to probe with.

Losses of the base are measured once, before an adapter is there; everything later is paired with
them by document. Costs one evaluation of all general text at the start, and one more of the control
part to see how far documents move apart (`spread`). Windows do not overlap: half the cost of
`forgetless eval`.

    baseline = measure_baseline(model, tokenizer, documents, parse("1%"))
    baseline.control.rise(tuned_model, error=0.05)       # a Rise with its interval
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from forgetless.budget.budget import Budget, planned_bound, split
from forgetless.data.documents import Document
from forgetless.data.encoding import Encoded
from forgetless.data.own_text import OwnText
from forgetless.evaluate.losses import LONGEST_WINDOW
from forgetless.evaluate.paired import PairedText, content, encoded_each, pair_with
from forgetless.evaluate.paired_answers import PairedAnswers, paired_part
from forgetless.evaluate.rise import FEW_DOCUMENTS, Rise
from forgetless.files.schema import GENERAL
from forgetless.model.adapter_path import AdapterPath
from forgetless.model.loading import context_length
from forgetless.model.update import Update

# Tokens of a probed piece: short, so that a probe is an average over many documents.
PIECE = 128
# Pieces that say how large a random update costs about the budget; the control part is asked after.
SPREAD_PIECES = 48


class PlannedBound(NamedTuple):
    """The rise of the control part, the value that the check's upper end is expected to stay below
    on every source of text, and the source for which it is largest.
    """

    rise: Rise
    bound: float
    worst: str


class Spread(NamedTuple):
    """The rise of a random update that costs about the budget, and the size of that update."""

    rise: Rise
    size: float


@dataclass(frozen=True)
class Guard:
    """A domain learned before, whose loss may rise by no more than the budget either: its held-out
    rows in two parts, measured right after it was learned.
    """

    name: str
    control: PairedText
    check: PairedText


# What a budget is kept on: a general text, or what the base says itself.
Held = PairedText | PairedAnswers


@dataclass(frozen=True)
class Baseline:
    """The two parts of what the budget is kept on, and the pieces of the control part to probe
    with, in a random order; in a sequence, the domains before.

    `moved`: the model that training starts from is no longer the one that was measured, so that an
    update of nothing has a rise of its own.
    """

    budget: Budget
    control: Held
    check: Held
    pieces: Held
    guards: tuple[Guard, ...] = ()
    moved: bool = False

    def moved_on(self) -> Baseline:
        """The same, for a model that is no longer the one that was measured: what lies under its
        adapter is not the base that the rise counts from.
        """
        control, check = (
            part.by_stored() if isinstance(part, PairedAnswers) else part
            for part in (self.control, self.check)
        )
        return replace(self, control=control, check=check, moved=True)

    def few_pieces(self) -> Held:
        """As many pieces as say roughly how much the loss rose."""
        return self.pieces.some(range(min(SPREAD_PIECES, len(self.pieces))))

    def offset(self, model: nn.Module) -> float:
        """The rise of the pieces now, in nats per token."""
        few = self.few_pieces()
        return few.rise_without_interval(few.losses(model))

    def planned(self, model: nn.Module, *, error: float) -> PlannedBound:
        """What is to be expected of the check at this state of the model, measured on the control
        parts alone. Costs one evaluation of each.
        """
        rise = self.control.rise(model, error=error)
        bounds = {GENERAL: planned_bound(rise, len(self.check), error=error)}
        for guard in self.guards:
            own = guard.control.rise(model, error=error)
            bounds[guard.name] = planned_bound(own, len(guard.check), error=error)
        worst = max(bounds, key=lambda name: bounds[name])
        return PlannedBound(rise, bounds[worst], worst)

    def checked(self, model: nn.Module, *, error: float) -> dict[str, Rise]:
        """The rise of every source's check part.

        The budget is kept where each is within it: no correction for their number is needed to say
        so.
        """
        rises = {GENERAL: self.check.rise(model, error=error)}
        for guard in self.guards:
            rises[guard.name] = guard.check.rise(model, error=error)
        return rises

    def spread(self, model: nn.Module, update: Update | AdapterPath, *, error: float) -> Spread:
        """How far apart control documents move under a random update that costs about the budget;
        the update is as before afterwards.

        The rise of a random update grows with the square of its size, so the size is found in at
        most 6 small evaluations of a few pieces; then one of the control part, or two where the
        first missed the budget: on the lab's text it cost as little as 0.39 of one, whose interval
        is too narrow.
        """
        few = self.few_pieces()
        size = 1e-3
        try:
            for _ in range(6):
                update.randomise(size)
                ratio = self._budget_over(few.rise_without_interval(few.losses(model)))
                size *= _step_towards(ratio)
                if _is_near(ratio):
                    break
            for _ in range(2):
                update.randomise(size)
                spread = Spread(self.control.rise(model, error=error), size)
                ratio = self._budget_over(spread.rise.nats)
                if _is_near(ratio):
                    break
                size *= _step_towards(ratio)
            return spread
        finally:
            update.scale(1)

    def _budget_over(self, nats: float) -> float:
        """How many times a rise goes into the budget; 64 where there is none."""
        return self.budget.nats / nats if nats > 0 else 64.0


def _is_near(ratio: float) -> bool:
    return 0.8 < ratio < 1.25


def _step_towards(ratio: float) -> float:
    """The factor of a size whose rise should become `ratio` times as large, by its square."""
    return min(8.0, max(0.125, math.sqrt(ratio)))


def measure_baseline(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    budget: Budget,
    *,
    pieces: int = 4096,
    seed: int = 0,
) -> Baseline:
    """Split `documents`, encode them and measure the base.

    `pieces` is how many pieces will be probed at most. Raises ValueError where there are too few
    documents for any interval.
    """
    encoded, with_targets = encoded_each(documents, tokenizer)
    sources = [document.source for document in with_targets]
    sides = split([content(document) for document in with_targets], sources)
    if min(map(len, sides)) < FEW_DOCUMENTS:
        raise ValueError(
            f"the general text is too short for a budget: {len(with_targets)} documents with "
            f"something to predict, expected at least {2 * FEW_DOCUMENTS} "
            "different ones, since half of them are kept for the check; give more (a blank line "
            "ends a document of a .txt file)"
        )
    window = min(LONGEST_WINDOW, context_length(model))
    control, check = (
        pair_with(model, [encoded[i] for i in side], [sources[i] for i in side], window)
        for side in sides
    )
    cut = _shuffled_pieces(control.encoded, seed)[:pieces]
    probed = pair_with(model, cut, [""] * len(cut), min(PIECE, window))
    return Baseline(budget, control, check, probed)


def answers_baseline(
    base: nn.Module,
    tokenizer: Any,
    own: OwnText,
    budget: Budget,
    *,
    check: PairedAnswers | None = None,
    seed: int = 0,
) -> Baseline:
    """The control and check parts of what the base says itself; `check` where it has been measured
    already. Probed are whole answers of the control part, by what is stored of the base, at half of
    the price of the exact divergence.

    Raises ValueError where there are too few answers for any interval.
    """
    control = paired_part(base, tokenizer, own, "control")
    check = check or paired_part(base, tokenizer, own, "check")
    assert control is not None and check is not None
    order = random.Random(seed).sample(range(len(control)), len(control))
    probed = control.some(order).by_stored()
    return Baseline(budget, control, check, probed)


def _shuffled_pieces(encoded: Sequence[Encoded], seed: int) -> list[Encoded]:
    """Documents cut into pieces of PIECE tokens, those with something to predict, in a random
    order.
    """
    cut = [
        (ids[i : i + PIECE], scored[i : i + PIECE])
        for ids, scored in encoded
        for i in range(0, len(ids), PIECE)
    ]
    cut = [piece for piece in cut if any(piece[1][1:])]
    random.Random(seed).shuffle(cut)
    return cut


def guard_of(model: nn.Module, name: str, encoded: list[Encoded], window: int) -> Guard:
    """Held-out rows of a domain, split by their content and measured now.

    Raises ValueError where there are too few.
    """
    contents = [str(ids) for ids, _ in encoded]
    check_held_out(name, len(set(contents)))
    control, check = (
        pair_with(model, [encoded[i] for i in side], [name] * len(side), window)
        for side in split(contents, [name] * len(encoded))
    )
    return Guard(name, control, check)


def check_held_out(name: str, rows: int) -> None:
    """Raise ValueError where a domain has too few different held-out rows to keep a budget on."""
    if rows < 2 * FEW_DOCUMENTS:
        raise ValueError(
            f"domain {name} has {rows} different held-out rows; to keep a budget on it, at least "
            f"{2 * FEW_DOCUMENTS} are needed: give more with "
            "--eval-data, or a larger --limit"
        )
