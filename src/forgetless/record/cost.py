"""What an update costs in general loss or in divergence: its rise at several sizes, and the
parabola through them.

An update is scaled until it costs about 0.5, 1, 2 and 5 % of perplexity, where budgets lie. Then
f s + q s^2 is fitted to what it did cost at each fraction s of it:

    points = measured_points(model, update, part, cost)
    first, second, error = parabola(points)              # f, q, standard error of q
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from forgetless.evaluate.paired import PairedText
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.model.update import Update

# Nats per token that an update is scaled to cost; the first guess is the best in the middle.
AIMS = (0.02, 0.005, 0.01, 0.05)
# A rise is near enough to an aim within this factor of it.
NEAR = 1.5
# Measurements for one aim, at most.
TRIES = 3
# Fractions that differ by less than this part of themselves are one measurement.
SAME = 0.05
# No update is scaled to more than so many times what was trained.
LARGEST_FRACTION = 8.0
# Nats per token that no usual budget allows: further out the loss rises faster than by squares.
BEYOND = 0.08
# A parabola may be off by this part of a rise, beside the noise of the documents.
OFF = 0.05
# The probability outside of the interval of a measured rise, both tails.
ERROR = 0.05


@dataclass(frozen=True)
class MeasuredPoint:
    """The measured rise at a fraction of an update."""

    fraction: float
    nats: float
    standard_error: float

    def plain(self) -> dict[str, float]:
        """As an importance file holds it."""
        return {
            "share": self.fraction,
            "nats": self.nats,
            "standard_error": self.standard_error,
        }


def measured_points(
    model: nn.Module, update: Update, part: PairedText | PairedAnswers, cost: float
) -> list[MeasuredPoint]:
    """Measured rises at fractions of an update where it costs about AIMS.

    `cost`: what all of it should cost, in nats per token; 0 where that is not known. The update is
    left at the last fraction.
    """
    points: list[MeasuredPoint] = []
    for aim in AIMS:
        for _ in range(TRIES):
            fraction = min(LARGEST_FRACTION, _next_fraction(points, aim, cost))
            if any(abs(fraction / point.fraction - 1) < SAME for point in points):
                break
            update.scale(fraction)
            rise = part.rise(model, error=ERROR)
            points.append(MeasuredPoint(fraction, rise.nats, rise.within or rise.standard_error))
            if aim / NEAR < rise.nats < NEAR * aim:
                break
    return points


def _next_fraction(points: Sequence[MeasuredPoint], aim: float, cost: float) -> float:
    """Where the rise should be `aim`: between the measured fractions around it, in logs; outside of
    them by its square.
    """
    if not points:
        return math.sqrt(aim / cost) if cost else 1.0
    smaller = [point for point in points if point.nats < aim]
    larger = [point for point in points if point.nats >= aim]
    below = max(smaller, key=lambda point: point.fraction, default=None)
    above = min(larger, key=lambda point: point.fraction, default=None)
    if below is None or above is None:
        known = above or below
        assert known is not None
        change = aim / max(known.nats, aim / 16)
        return known.fraction * math.sqrt(min(16.0, max(1 / 64, change)))
    between = 0.5
    if 0 < below.nats < above.nats:
        between = math.log(aim / below.nats) / math.log(above.nats / below.nats)
    return float(below.fraction * (above.fraction / below.fraction) ** between)


def parabola(points: Sequence[MeasuredPoint], *, linear: bool = True) -> tuple[float, float, float]:
    """(f, q, standard error of q) of f s + q s^2 through measured rises, by least squares, weighted
    by their standard errors and 5 % of themselves. Without `linear`, f is 0: a divergence is
    nothing at the base and rises from there on every side.

    Rises above all budgets are left out: further out the loss rises faster than by squares. Nothing
    is known from fewer than three sizes: q is 0.
    """
    points = [point for point in points if point.nats <= BEYOND]
    if len(points) < 3:
        return 0.0, 0.0, 0.0
    s = np.array([point.fraction for point in points])
    nats = np.array([point.nats for point in points])
    error = np.array([point.standard_error for point in points])
    weight = 1 / np.hypot(np.maximum(error, 1e-6), OFF * nats)
    powers = [s, s**2] if linear else [s**2]
    X = np.stack(powers, 1) * weight[:, None]
    found, _, rank, _ = np.linalg.lstsq(X, nats * weight, rcond=None)
    if rank < len(powers):
        return 0.0, 0.0, 0.0
    squares = float(((X @ found - nats * weight) ** 2).sum())
    scatter = max(1.0, squares / (len(points) - len(powers)))
    error_of_second = math.sqrt(scatter * float(np.linalg.inv(X.T @ X)[-1, -1]))
    return (float(found[0]) if linear else 0.0), float(found[-1]), error_of_second
