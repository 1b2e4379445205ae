"""Calibration: what a unit of energy costs in general loss, or in divergence from the base on its
own answers, measured once on fine-tuning-like updates, so that a rise can be predicted without
text.

    rise of a fraction s of an update U = s <g, U> + s^2 c E(U)

`g` is the gradient of the general loss at the base model (the first-order term, kept as a product
of thin factors; of a divergence it is nothing), E the energy of the importance that the calibration
belongs to. c is what was measured: some updates were trained, each held by the importance, and
measured at several sizes on documents that were not recorded; the q of f s + q s^2 fitted to their
rises gives c = q / E of each. Their geometric mean predicts, and the spread of log c gives the
error: the bound is a one-sided prediction limit for one more update, with Student's t for as many
updates as there are. A fall that g foresees is not counted in it, since nothing bounds the error of
g.

It holds for updates like those that were measured, on text like that they were measured on. Nothing
here looks at text. How well it predicts is in experiments/calibration.md and predicted.md.

    calibration.rise(first, energy)      # nats per token, predicted
    calibration.bound(first, energy)     # below which 19 in 20 such updates stay
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from forgetless.evaluate.rise import t_quantile
from forgetless.files.budget_json import CalibrationUsed
from forgetless.files.measured_json import DIVERGENCE
from forgetless.files.untrusted import JsonObject
from forgetless.model.weights import LowRankWeight, TargetWeight
from forgetless.options.estimators import NATS_STRENGTH, known

# This fraction of updates like the measured ones stays below the bound.
COVERED = 0.95
# At least so many updates must have a cost, or their spread says nothing.
FEWEST = 4
# At least this fraction of the updates must have a cost, or they were too small to measure.
CLEAR_FRACTION = 2 / 3
# An update has a cost where q is so many of its standard errors above nothing. When all of them
# counted, a model that knew nothing was called accurate to a factor of 2.2 on 36 rises of noise.
CLEAR = 2.0
# A unit of energy that is in nats itself costs between one over this and this many nats: about 3
# and 6 were measured on two models.
PLAUSIBLE = 1e3
# No |log c| is larger, whatever the unit of the importance: no two units differ by e^100.
POSSIBLE = 100.0


@dataclass(frozen=True)
class MeasuredUpdate:
    """An update that was measured: its energy, and f s + q s^2, the rise at a fraction s of it."""

    energy: float  # E of all of it
    first: float  # f, nats per token
    second: float  # q, nats per token
    second_error: float  # standard error of q
    how: Mapping[str, Any] = field(default_factory=dict)  # how it was made, as the file says it
    points: Sequence[Mapping[str, float]] | None = None  # the measured rises, as the file has them

    @staticmethod
    def of(plain: Mapping[str, Any]) -> MeasuredUpdate:
        """An update as a file holds it; what is not known here is kept in `how`."""
        names = {each.name for each in fields(MeasuredUpdate)} - {"how"}
        known = {name: plain[name] for name in names if name in plain}
        return MeasuredUpdate(**known, how={k: v for k, v in plain.items() if k not in names})

    def plain(self) -> JsonObject:
        """As a file holds it."""
        found = {
            **self.how,
            "energy": self.energy,
            "first": self.first,
            "second": self.second,
            "second_error": self.second_error,
        }
        return found if self.points is None else {**found, "points": list(self.points)}

    @property
    def is_clear(self) -> bool:
        """Whether it clearly costs something by its size."""
        return self.energy > 0 and self.second > max(0.0, CLEAR * self.second_error)


@dataclass(frozen=True)
class Calibration:
    """Measured updates, and the gradient of the general loss; of a divergence there is none.

    `gradients` maps names to (L, R), (out, k) and (k, in), of which g is about the product.

    Raises ValueError where fewer than two thirds of the updates clearly cost something.
    """

    updates: Sequence[MeasuredUpdate]
    gradients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Documents and tokens that were measured on, the sha256 of all that was kept apart, and where
    # it was the divergence on answers of the base that was measured, `of`.
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = max(FEWEST, math.ceil(CLEAR_FRACTION * len(self.updates)))
        if self.used < needed:
            raise ValueError(
                f"{self.used} of {len(self.updates)} updates clearly raise {self._what} with "
                "the square of their size, expected at least "
                f"{needed}: the calibration says nothing about this model and text"
            )
        if not max(map(abs, self._logs)) < POSSIBLE:
            raise ValueError(
                f"an update costs e^{max(self._logs, key=abs):.0f} nats per unit of energy, "
                "which none does; record again"
            )

    @cached_property
    def _logs(self) -> list[float]:
        """log c of each update that has one."""
        clear = [update for update in self.updates if update.is_clear]
        return [math.log(update.second) - math.log(update.energy) for update in clear]

    @property
    def diverges(self) -> bool:
        """Whether it is the divergence from the base on its own answers that was measured."""
        return self.data.get("of") == DIVERGENCE

    @property
    def _what(self) -> str:
        return "the divergence from the base" if self.diverges else "the general loss"

    @property
    def used(self) -> int:
        """How many updates have a cost."""
        return len(self._logs)

    @cached_property
    def cost(self) -> float:
        """c: nats per token for a unit of energy."""
        return math.exp(statistics.mean(self._logs))

    @cached_property
    def error(self) -> float:
        """The factor by which the second-order part is typically off, from update to update."""
        return math.exp(statistics.stdev(self._logs))

    @cached_property
    def factor(self) -> float:
        """How much larger the second-order part of one more update may be, 19 times in 20."""
        n = len(self._logs)
        return math.exp(
            t_quantile(COVERED, n - 1) * statistics.stdev(self._logs) * math.sqrt(1 + 1 / n)
        )

    def first(self, weights: Iterable[TargetWeight]) -> float:
        """<g, U>, in nats per token, at the weights as they are now.

        Costs two thin products per weight; a divergence has none.
        """
        if self.diverges:
            return 0.0
        return sum(_along(weight, *self.gradients[weight.name]) for weight in weights)

    def rise(self, first: float, energy: float) -> float:
        """The predicted rise of the general loss, in nats per token."""
        return first + self.cost * energy

    def bound(self, first: float, energy: float) -> float:
        """The rise that 19 of 20 updates like the measured ones stay below."""
        return max(first, 0.0) + self.factor * self.cost * energy

    def describe(self) -> str:
        """For people."""
        of = f" of {len(self.updates)}" if self.used < len(self.updates) else ""
        pieces = "answers of the base" if self.diverges else "documents"
        nats = "nats of divergence" if self.diverges else "nats"
        return (
            f"{self.used}{of} updates measured on {self.data.get('documents', '?')} {pieces}: a "
            f"unit of energy costs {self.cost:.3g} {nats}, off by a "
            f"factor of {self.error:.2g} typically, {self.factor:.2g} at most 19 times in 20"
        )

    def used_record(self) -> CalibrationUsed:
        """For run.json."""
        return CalibrationUsed(
            cost=self.cost,
            error=self.error,
            factor=self.factor,
            updates=self.used,
            data=dict(self.data),
        )


def usual_strength(info: Mapping[str, Any], cost: float) -> float:
    """The strength to hold importance with where nothing says better: known where its energy is in
    nats, else by what a unit of it costs. `info`: what the importance says about itself.
    """
    estimator = known(info.get("estimator"))
    if estimator is not None and estimator.in_nats and estimator.strength is not None:
        return estimator.strength
    return NATS_STRENGTH * cost


def _along(weight: TargetWeight, L: Tensor, R: Tensor) -> float:
    """<L R, U> of one weight."""
    if isinstance(weight, LowRankWeight):
        left, right = weight.factors()
        return float(((left.T @ L.to(left)) * (right @ R.to(right).T)).sum())
    U = weight.update()
    return float((L.to(U) * (U @ R.to(U).T)).sum())
