"""How much more a loss is than it was, in nats per token, and how well that is known: the one form
that forgetting, learning and the checks of a budget have in every file, table and page.

    rise       (sum of after - before) / (sum of tokens), paired by document
    interval   leave-one-cluster-out jackknife: variance (G - 1) / G * sum of (rise without g -
               rise)^2, times Student's t with G_eff - 1 degrees of freedom, G_eff = 1 / sum of
               (fraction of tokens)^2
    clusters   sources, or documents where all of them come from one source

Documents of one source move together, so that a text of 150 documents from 6 sources knows a rise
little better than 6 documents would. Few sources of unequal size are why the jackknife and G_eff
are used: with six of them in the proportions of the lab's text, 95 % intervals covered 0.96 (G - 1
degrees of freedom: 0.93; residuals instead of the jackknife: 0.92; documents as if independent:
0.61), in 3,000 draws with equal spread between and within sources.

    rise = paired_rise(before, after, tokens, sources)      # each (documents,)
    rise.low <= rise.nats <= rise.high
    learning = -paired_rise(...)                            # a fall is a rise with the sign turned
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from forgetless.files.measured_json import Interval
from forgetless.files.schema import plain_of
from forgetless.files.untrusted import JsonObject
from forgetless.report.numbers import perplexity_percent

# The probability that a verdict is wrong, over both tails and all checks of a run together: the
# usual 95 % interval.
ERROR_LEVEL = 0.05
# The fewest documents that a part of a general text may have: below them no interval is worth its
# name.
FEW_DOCUMENTS = 10


@dataclass(frozen=True)
class Rise:
    """A rise in nats per token, its standard error, and the interval from `low` to `high`.

    `error` is the probability of a value outside of the interval, both tails together. `by` says
    what was left out in turn: "source" or "document". `clusters` counts those, and `effective` is
    how many of equal size would know as much. `within` is the standard error over other documents
    of the same sources. A rise that cannot have an interval (`alone`) has NaN for it here, and null
    in a file.
    """

    nats: float
    standard_error: float
    low: float
    high: float
    error: float
    by: str
    clusters: int
    effective: float
    documents: int
    within: float = 0.0

    def __neg__(self) -> Rise:
        """The fall of the loss, which learning is."""
        return replace(self, nats=-self.nats, low=-self.high, high=-self.low)

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the interval."""
        return max(1.0, self.effective - 1)

    def estimate(self) -> dict[str, float | None]:
        """The rise and its standard error alone, for a table of many."""
        return {"nats": self.nats, "standard_error": _or_null(self.standard_error)}

    def record(self, *, percent: bool = True) -> Interval:
        """The rise as a file has it; with `percent` also of perplexity, which a fall has not."""
        return Interval(
            nats=self.nats,
            percent=perplexity_percent(self.nats) if percent else None,
            standard_error=_or_null(self.standard_error),
            low=_or_null(self.low),
            high=_or_null(self.high),
            confidence=1 - self.error,
            by=self.by,
            clusters=self.clusters,
            effective_clusters=self.effective,
            documents=self.documents,
        )

    def numbers(self, *, percent: bool = True) -> JsonObject:
        """`record` as plain data."""
        return plain_of(self.record(percent=percent))

    def how(self) -> str:
        """How the interval was made, for people."""
        few = f", in effect {self.effective:.1f}" if self.effective < 0.9 * self.clusters else ""
        return (
            f"{1 - self.error:.4g} interval leaving out one of {self.clusters} "
            f"{self.by}s{few} in turn; t with {self.degrees:.1f} degrees of freedom"
        )


def alone(nats: float, *, error: float = ERROR_LEVEL) -> Rise:
    """The rise of a single document, about which no interval can be said."""
    unknown = math.nan
    return Rise(nats, unknown, unknown, unknown, error, "document", 1, 1.0, 1, within=unknown)


def _or_null(value: float) -> float | None:
    """A number for a file, in which an unknown one is null."""
    return None if math.isnan(value) else value


def paired_rise(
    before: np.ndarray,
    after: np.ndarray,
    tokens: np.ndarray,
    sources: Sequence[Hashable],
    *,
    error: float = ERROR_LEVEL,
) -> Rise:
    """The rise of documents whose summed losses were `before` and are `after`, all (documents,),
    with its interval.

    Raises ValueError for a single document.
    """
    changes = np.asarray(after, float) - np.asarray(before, float)
    tokens = np.asarray(tokens, float)
    by = "source" if len(set(sources)) > 1 else "document"
    group = numbered(sources) if by == "source" else np.arange(len(sources))
    count = int(group.max()) + 1 if len(group) else 0
    if count < 2:
        raise ValueError(
            f"a rise needs at least two documents to have an interval, found {len(sources)}; "
            "give more general text"
        )
    nats = float(changes.sum() / tokens.sum())
    rises = np.bincount(group, changes, count)  # (clusters,)
    sizes = np.bincount(group, tokens, count)
    without = (rises.sum() - rises) / (sizes.sum() - sizes)
    spread = math.sqrt((count - 1) / count * float(((without - nats) ** 2).sum()))
    rise = Rise(
        nats,
        spread,
        low=nats,
        high=nats,
        error=error,
        by=by,
        clusters=count,
        effective=float(sizes.sum() ** 2 / (sizes**2).sum()),
        documents=len(sources),
        within=spread if by == "document" else _within(changes, tokens, group, nats),
    )
    width = t_quantile(1 - error / 2, rise.degrees) * spread
    return replace(rise, low=nats - width, high=nats + width)


def numbered(sources: Sequence[Hashable]) -> np.ndarray:
    """Each document's source as a number, in the order in which they first appear: (documents,)."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(sources))}
    return np.array([numbers[source] for source in sources])


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
