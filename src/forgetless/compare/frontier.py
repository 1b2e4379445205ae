"""Learning against forgetting: the numbers that a comparison comes down to.

Pure functions of (learning, forgetting) points; numpy only.

A run is a curve: its points at update scales 0 (the base: learning and forgetting 0), ..., 1,
joined by straight lines.

    at_learning       forgetting of a run at a given learning: where its curve first reaches it;
                      None where it never does
    at_shares         the same at shares of plain fine-tuning's learning, over seeds: mean, standard
                      error, how many seeds reached it
    area              mean forgetting of a method over 0 .. 95 % of plain's learning, the best of
                      its runs at each: smaller is better
    on_frontier       which points no other point beats in both
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forgetless.evaluate.rise import t_quantile
from forgetless.files.compare_json import EqualLearning

# (learning, forgetting) by rising scale, without the base's (0, 0).
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class AtLearning:
    """Forgetting at a given learning, over the seeds of one setting."""

    learning_nats: float
    forgetting: float | None  # None unless every seed reached it
    standard_error: float | None  # over seeds; None for one seed
    seeds: int
    reached: int  # by how many seeds
    status: str


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Forgetting of one method minus that of another at equal learning."""

    difference: float
    standard_error: float | None
    ratio: float | None  # None where the other forgets nothing
    beyond_noise: bool | None  # None where nothing is known of the noise


def at_learning(curve: Curve, wanted: float) -> float | None:
    """Forgetting where the curve first reaches `wanted` learning, on a straight line between two
    scales; None where it does not reach it.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise([(0.0, 0.0), *curve]):
        if x0 < wanted <= x1:
            return y0 + (y1 - y0) * (wanted - x0) / (x1 - x0)
    return None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error over seeds; no error for one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def at_share(curves: Sequence[Curve], wanted: float) -> AtLearning:
    """Forgetting at `wanted` learning over the seeds of one setting; a number only where every seed
    reached it.
    """
    found = [at_learning(curve, wanted) for curve in curves]
    reached = [value for value in found if value is not None]
    whole = bool(found) and len(reached) == len(found)
    mean, error = mean_and_error(reached) if whole else (None, None)
    status = f"reached by {len(reached)} of {len(found)}" if reached else "not reached"
    return AtLearning(
        learning_nats=wanted,
        forgetting=mean,
        standard_error=error,
        seeds=len(found),
        reached=len(reached),
        status="reached" if whole else status,
    )


def choice_key(curves: Sequence[Curve], wanted: float) -> float:
    """For choosing among settings: forgetting at the wanted learning, or behind all that reach it
    by how much is lacking.
    """
    found = at_share(curves, wanted)
    if found.forgetting is not None:
        return float(found.forgetting)
    return 1e3 - statistics.fmean(max(x for x, _ in curve) for curve in curves)


def area(
    curves: Sequence[Curve], reference: float, *, share: float = 0.95, points: int = 200
) -> float | None:
    """Mean over learning from 0 to share * reference of the least forgetting of any of the curves;
    None where they don't reach it all.
    """
    best = []
    for wanted in np.linspace(0, share * reference, points + 1)[1:]:
        reached = [
            value for curve in curves if (value := at_learning(curve, float(wanted))) is not None
        ]
        if not reached:
            return None
        best.append(min(reached))
    return float(np.mean(best))


def on_frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point learns at least as much and forgets at most as much, one of them
    strictly.
    """
    beaten = lambda a, b: b[0] >= a[0] and b[1] <= a[1] and b != a
    return [not any(beaten(point, other) for other in points) for point in points]


def difference(
    a: AtLearning | EqualLearning, b: AtLearning | EqualLearning, noise: float | None
) -> Gap | None:
    """Forgetting of `a` minus that of `b` (two results of `at_share`); None unless both were
    reached.

    Beyond the noise: outside of Welch's 95 % interval over seeds (three seeds each: 2.8 to 4.3
    standard errors); with one seed each, more than twice the spread of plain over seeds where that
    is known. No correction for the number of comparisons.
    """
    if a.forgetting is None or b.forgetting is None:
        return None
    gap = a.forgetting - b.forgetting
    error, bound = None, None
    if a.standard_error is not None and b.standard_error is not None:
        errors = (a.standard_error, b.standard_error)
        error = math.sqrt(sum(e * e for e in errors))
        bound = _half_width(errors, (a.seeds or 0, b.seeds or 0))
    elif noise is not None:
        bound = 2 * noise
    return Gap(
        difference=gap,
        standard_error=error,
        ratio=a.forgetting / b.forgetting if b.forgetting > 0 else None,
        beyond_noise=None if bound is None else abs(gap) > bound,
    )


def _half_width(errors: tuple[float, float], seeds: tuple[int, int]) -> float:
    """Half of Welch's 95 % interval of a difference of means over seeds."""
    parts = [(error**2, count - 1) for error, count in zip(errors, seeds, strict=True)]
    square = sum(part for part, _ in parts)
    if square == 0:
        return 0.0
    return t_quantile(
        0.975, square**2 / sum(part**2 / degrees for part, degrees in parts)
    ) * math.sqrt(square)
