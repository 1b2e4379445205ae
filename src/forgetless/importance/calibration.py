"""Calibration: what a unit of energy costs in general loss, measured once on fine-tuning-like
updates, so that a rise can be predicted without general text.

    rise of share s of an update U = s <g, U> + s^2 c E(U)

`g` is the gradient of the general loss at the base model (the first-order term, kept as a product
of thin factors), E the energy of the importance that the calibration belongs to. c is what was
measured: some updates were trained, each held by the importance, and measured at several sizes on
documents that were not recorded; the q of f s + q s^2 fitted to their rises gives c = q / E of
each. Their geometric mean predicts, and the spread of log c gives the error: the bound is a
one-sided prediction limit for one more update, with Student's t for as many updates as there are. A
fall that g foresees is not counted in it, since nothing bounds the error of g.

It holds for updates like those that were measured, on text like that they were measured on; nothing
here looks at text (experiments/calibration.md and predicted.md: how well it does).

    calibration.rise(first, energy)      # nats per token, predicted
    calibration.bound(first, energy)     # below which 19 in 20 such updates stay
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from forgetless.evaluate.rise import t_quantile
from forgetless.model.weights import LowRankWeight, TargetWeight
from forgetless.options.estimators import NATS_STRENGTH, known

COVERED = 0.95  # of updates like the measured ones stay below the bound
FEWEST, SHARE = 4, 2 / 3  # updates that must have a cost: in number, and of all
CLEAR = 2.0  # standard errors that q must be above nothing
PLAUSIBLE = 1e3  # nats for a unit of energy that is in nats itself, and one over it
POSSIBLE = 100.0  # of |log c|, whatever the unit of the importance


@dataclass(frozen=True)
class Calibration:
    """Measured updates, and the gradient of the general loss.

    `gradients` maps names to (L, R), (out, k) and (k, in), of which g is about the product.

    An update is plain data: `energy` of all of it, the `first` and `second` of its rise (f and q)
    with `second_error`; and how it was made and measured. Raises ValueError where fewer than two
    thirds of the updates clearly cost something.
    """

    updates: Sequence[Mapping[str, Any]]
    gradients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(
        default_factory=dict
    )  # documents and tokens measured on, sha256 of all that was kept apart

    def __post_init__(self) -> None:
        needed = max(FEWEST, math.ceil(SHARE * len(self.updates)))
        if self.used < needed:
            raise ValueError(
                f"{self.used} of {len(self.updates)} updates clearly raise the general loss with "
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
        clear = [
            u
            for u in self.updates
            if u["energy"] > 0 and u["second"] > max(0.0, CLEAR * u["second_error"])
        ]
        return [math.log(update["second"]) - math.log(update["energy"]) for update in clear]

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
        """The factor by which the second-order part is typically off, from one update to the next."""
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

        Costs two thin products per weight.
        """
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
        return (
            f"{self.used}{of} updates measured on {self.data.get('documents', '?')} documents: a "
            f"unit of energy costs {self.cost:.3g} nats, off by a "
            f"factor of {self.error:.2g} typically, {self.factor:.2g} at most 19 times in 20"
        )

    def numbers(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "cost": self.cost,
            "error": self.error,
            "factor": self.factor,
            "updates": self.used,
            "data": dict(self.data),
        }


def usual_strength(importance: Any, cost: float) -> float:
    """The strength to hold with where nothing says better: known for importance in nats, else by
    what a unit of energy costs.
    """
    estimator = known(importance.info.get("estimator"))
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
