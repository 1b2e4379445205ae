"""The scan: the rise on the control part and the learning at many fractions of an update, along one
way of making it smaller, and the choice among them.

    points = Scan(baseline, model, "scale", update.scale, learning).points
    choose_point(points, budget.nats)          # the most learning among those that keep the budget

A fraction keeps a budget where its planned bound is within it: the value below which the check's
upper end will be 19 times in 20. Costs 2 to 12 evaluations of the control part and of the domain
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from forgetless.budget.baseline import PlannedBound
from forgetless.budget.budget import Budget
from forgetless.budget.learning import Learning
from forgetless.budget.ways import mu_of
from forgetless.evaluate.rise import ERROR_LEVEL, Rise
from forgetless.files.budget_json import Bought, CurvePoint
from forgetless.files.schema import GENERAL

# The fractions of the update that are measured first, largest first.
FRACTIONS = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0.05)
# Fractions tried between the best one that keeps the budget and the next larger one.
REFINED = 3
# The error probability of one check: the first one and that of the fallback share ERROR_LEVEL.
EACH = ERROR_LEVEL / 2
# Other budgets, in per cent of perplexity, of which it is said what they would have bought.
OTHERS = (0.5, 1.0, 2.0, 5.0)


class Planner(Protocol):
    """What a scan asks: a baseline, which measures, or a forecast (predicted.py)."""

    @property
    def budget(self) -> Budget: ...
    def planned(self, model: nn.Module, *, error: float) -> PlannedBound: ...


@dataclass(frozen=True)
class ScanPoint:
    """One fraction of the update: its rise on the control part, what the check's upper end is
    expected to stay below on the source `worst`, and its learning.
    """

    way: str
    fraction: float
    rise: Rise
    bound: float
    learning: Rise | None
    worst: str = GENERAL

    @property
    def mu(self) -> float | None:
        """How hard an update was shrunk along importance; None where it was not."""
        return mu_of(self.fraction) if self.way == "shrink" and self.fraction > 0 else None

    @property
    def gain(self) -> float:
        """What is to be largest: learning, or the fraction where no domain data says better."""
        return self.fraction if self.learning is None else self.learning.nats

    def record(self) -> CurvePoint:
        """For run.json."""
        learning = None if self.learning is None else self.learning.record(percent=False)
        return CurvePoint(
            way=self.way,
            fraction=self.fraction,
            mu=self.mu,
            rise=self.rise.record(),
            bound=self.bound,
            worst=self.worst,
            learning=None if learning is None else learning.nats,
            learning_standard_error=None if learning is None else learning.standard_error,
        )


# The base model: none of the update, which costs nothing and gains nothing.
NO_UPDATE = ScanPoint(
    "scale", 0.0, Rise(0.0, 0.0, 0.0, 0.0, EACH, "document", 0, 0.0, 0), 0.0, None
)


class Scan:
    """Points along one way, more of them where the budget is crossed.

    `whole` is the point of all of the update where it was measured along another way, since it is
    the same along every way. Fractions that can buy nothing are left out, until `below` asks for
    them.
    """

    def __init__(
        self,
        planner: Planner,
        model: nn.Module,
        way: str,
        apply: Callable[[float], None],
        learning: Learning | None,
        whole: ScanPoint | None = None,
    ):
        self.planner = planner
        self.model = model
        self.way = way
        self.apply = apply
        self.learning = learning
        # The largest fraction comes first.
        self.points = [] if whole is None else [replace(whole, way=way)]
        for fraction in FRACTIONS[len(self.points) :]:
            self._measure(fraction)
            if self._enough():
                break
        for _ in range(REFINED):
            best = choose_point(self.points, planner.budget.nats)
            larger = [point.fraction for point in self.points if point.fraction > best.fraction]
            if not larger:
                break
            self._measure((best.fraction + min(larger)) / 2)

    def below(self, fraction: float) -> list[ScanPoint]:
        """All points below a fraction, those included that were left out."""
        end = min(fraction, self.points[-1].fraction)
        for lower in [lower for lower in FRACTIONS if lower < end]:
            self._measure(lower)
        return [point for point in self.points if point.fraction < fraction]

    def _measure(self, fraction: float) -> None:
        self.apply(fraction)
        rise, bound, worst = self.planner.planned(self.model, error=EACH)
        learned = None if self.learning is None else self.learning.of(self.model)
        point = ScanPoint(self.way, fraction, rise, bound, learned, worst)
        self.points = sorted([*self.points, point], key=lambda each: -each.fraction)

    def _enough(self) -> bool:
        """Whether the smallest fraction learns less than a larger one, and both keep the smallest
        budget that is reported on.
        """
        least = min(self.planner.budget.nats, *(math.log1p(other / 100) for other in OTHERS))
        *larger, last = self.points
        return last.bound <= least and any(
            point.bound <= least and point.gain > last.gain for point in larger
        )


def choose_point(
    points: Sequence[ScanPoint], limit: float, nothing: ScanPoint = NO_UPDATE
) -> ScanPoint:
    """The point with the largest gain among those whose bound is within `limit`; `nothing`, the
    model before training, where none gains anything.
    """
    within = [point for point in points if point.bound <= limit and point.gain > 0]
    return max(within, key=lambda point: point.gain, default=nothing)


def bought(points: Sequence[ScanPoint], limit: float) -> Bought:
    """What a budget of `limit` nats buys along `points`."""
    point = choose_point(points, limit)
    if point is NO_UPDATE:
        learning: float | None = 0.0
    else:
        learning = None if point.learning is None else point.learning.nats
    return Bought(point.way, point.fraction, point.mu, learning)
