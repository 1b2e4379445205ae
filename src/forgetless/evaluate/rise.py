"""TODO evaluate.rise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from forgetless.report.numbers import perplexity_percent

ERROR = 0.05  # probability that a verdict is wrong, both tails, all checks of a run together
FEW_DOCUMENTS = 10  # per part: below this no interval is worth its name


@dataclass(frozen=True)
class Interval:
    """A rise in nats per token with its interval; `by` says what was left out in turn."""

    nats: float
    standard_error: float
    low: float
    high: float
    error: float  # probability outside, both tails
    by: str  # "source" or "document"
    clusters: int
    effective: float
    documents: int
    within: float = 0.0  # standard error over documents of the same sources

    @property
    def degrees(self) -> float:
        return max(1.0, self.effective - 1)

    def numbers(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "nats": self.nats,
            "percent": perplexity_percent(self.nats),
            "standard_error": self.standard_error,
            "low": self.low,
            "high": self.high,
            "level": 1 - self.error,
            "by": self.by,
            "clusters": self.clusters,
            "effective_clusters": self.effective,
            "documents": self.documents,
        }

    def how(self) -> str:
        """How the interval was made, for people."""
        few = f", in effect {self.effective:.1f}" if self.effective < 0.9 * self.clusters else ""
        return (
            f"{1 - self.error:.4g} interval leaving out one of {self.clusters} "
            f"{self.by}s{few} in turn; t with {self.degrees:.1f} degrees of freedom"
        )


def paired_rise(
    before: np.ndarray,
    after: np.ndarray,
    tokens: np.ndarray,
    sources: Sequence[str],
    *,
    error: float = ERROR,
) -> Interval:
    """The rise of documents whose summed losses were `before` and are `after`, all (documents,),
    with its interval. Raises ValueError below two clusters.
    """
    by = "source" if len(set(sources)) > 1 else "document"
    names = {name: i for i, name in enumerate(dict.fromkeys(sources))}
    group = (
        np.array([names[source] for source in sources])
        if by == "source"
        else np.arange(len(sources))
    )
    count = int(group.max()) + 1 if len(group) else 0
    if count < 2:
        raise ValueError(
            f"a rise needs at least two documents to have an interval, found {len(sources)}; "
            "give more general text"
        )
    rises = np.bincount(group, np.asarray(after, float) - np.asarray(before, float), count)
    sizes = np.bincount(group, np.asarray(tokens, float), count)
    rise = float(rises.sum() / sizes.sum())
    without = (rises.sum() - rises) / (sizes.sum() - sizes)
    spread = math.sqrt((count - 1) / count * float(((without - rise) ** 2).sum()))
    made = Interval(
        rise,
        spread,
        rise,
        rise,
        error,
        by,
        count,
        float(sizes.sum() ** 2 / (sizes**2).sum()),
        len(sources),
    )
    width = t_quantile(1 - error / 2, made.degrees) * spread
    within = (
        spread
        if by == "document"
        else _within(
            np.asarray(after, float) - np.asarray(before, float),
            np.asarray(tokens, float),
            group,
            rise,
        )
    )
    return replace(made, low=rise - width, high=rise + width, within=within)


def _within(rises: np.ndarray, tokens: np.ndarray, group: np.ndarray, rise: float) -> float:
    """Standard error of the rise over other documents of the same sources: residuals to each
    source's own rise (to the common one for a lone document).
    """
    number, sizes = np.bincount(group), np.bincount(group, tokens)
    own = np.where(number > 1, np.bincount(group, rises) / sizes, rise)
    residuals = np.bincount(group, (rises - tokens * own[group]) ** 2)
    return math.sqrt(
        float((residuals * np.where(number > 1, number / np.maximum(number - 1, 1), 1.0)).sum())
    ) / float(tokens.sum())


def t_quantile(p: float, degrees: float) -> float:
    """Quantile of Student's t for p >= 0.5 and any degrees of freedom >= 1, by bisection on its
    distribution function; the normal one from 10,000 degrees on, where the two differ by less than
    1e-4 of it.
    """
    if degrees >= 1e4:
        return NormalDist().inv_cdf(p)
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _t_below(t: float, degrees: float) -> float:
    """P(T < t) for t >= 0: with t = sqrt(degrees) tan(u) the density is a constant times
    cos(u)^(degrees - 1); Simpson's rule.
    """
    u = np.linspace(0, math.atan(t / math.sqrt(degrees)), 401)
    values = np.cos(u) ** (degrees - 1)
    area = float(
        (values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum())
        * (u[1] - u[0])
        / 3
    )
    return 0.5 + area * math.exp(
        math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    ) / math.sqrt(math.pi)
