"""A forgetting budget: how much the loss on general text may rise, whether it did, and how hard to hold so that it does not. Pure numbers, no model.

    budget     "1%" of perplexity is log(1.01) nats per token; "0.01nats" is taken as it is
    rise       (sum of after - before) / (sum of tokens), paired by document
    interval   leave-one-cluster-out jackknife: variance (G - 1) / G * sum of (rise without g - rise)^2, times Student's t with G_eff - 1 degrees of freedom,
               G_eff = 1 / sum of (share of tokens)^2. Clusters are sources, or documents where all come from one source
    verdict    on the check part: met (upper end within the budget), exceeded (lower end above), not shown (the budget lies inside)
    control    log strength = log start + integral + e (1.5 e below 0),  integral += 0.3 e,  e = log(rise / budget), limited: dual ascent in log space

Few sources of unequal size are why the jackknife and G_eff are used: with six of them in the shares of the lab's text, 95 % intervals covered 0.96
(G - 1 degrees of freedom: 0.93; residuals instead of the jackknife: 0.92; documents as if independent: 0.61), in 3,000 draws with equal spread between
and within sources.

    budget = parse("1%")                                              # Budget(nats=0.00995, text='1%')
    interval = paired_rise(before, after, tokens, sources)            # arrays (documents,)
    verdict(interval, budget.nats)                                    # 'met'
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from holdfast.options import OptionError

ERROR = 0.05  # probability that a verdict is wrong, both tails, all checks of a run together
PLANNED = 0.98  # quantile of the difference between the parts that lets the check be met 19 times in 20: the noise is itself an estimate (tests/test_budget.py)
FEW_DOCUMENTS = 10  # per part: below this no interval is worth its name


@dataclass(frozen=True)
class Budget:
    """The largest rise of the general loss that is allowed, in nats per token, and how it was written."""

    nats: float
    text: str


def parse(text: str) -> Budget:
    """'1%' of perplexity, or '0.01nats' per token. Raises OptionError for anything else and for budgets of nothing."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%|nats?)\s*", str(text))
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        raise OptionError(f"--budget expects a rise of perplexity like 1% or of the loss like 0.01nats, found '{text}'")
    if value <= 0:
        raise OptionError(f"--budget must be above 0, found '{text}': only the base model itself loses nothing")
    return Budget(math.log1p(value / 100) if match.group(2) == "%" else value, "".join(str(text).split()))


def percent(nats: float) -> float:
    """A rise of the loss as a rise of perplexity, in percent."""
    return 100 * math.expm1(nats)


def split(texts: Sequence[str], sources: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the control part and of the check part: by the hash of the text, half of each source, the same whatever the order of the documents.

    Copies of one text stay together. The odd text of a source goes to the part that has fewer so far.
    """
    by_source: dict[str, dict[str, list[int]]] = {}
    for index, (text, source) in enumerate(zip(texts, sources, strict=True)):
        by_source.setdefault(source, {}).setdefault(hashlib.sha256(text.encode()).hexdigest(), []).append(index)
    parts: tuple[list[int], list[int]] = ([], [])
    for source in sorted(by_source):
        first = 0 if len(parts[0]) <= len(parts[1]) else 1
        for place, digest in enumerate(sorted(by_source[source])):
            parts[(first + place) % 2].extend(by_source[source][digest])
    return sorted(parts[0]), sorted(parts[1])


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
        return {"nats": self.nats, "percent": percent(self.nats), "standard_error": self.standard_error, "low": self.low, "high": self.high,
                "level": 1 - self.error, "by": self.by, "clusters": self.clusters, "effective_clusters": self.effective,
                "documents": self.documents}  # fmt: skip

    def how(self) -> str:
        """How the interval was made, for people."""
        few = f", in effect {self.effective:.1f}" if self.effective < 0.9 * self.clusters else ""
        return f"{1 - self.error:.4g} interval leaving out one of {self.clusters} {self.by}s{few} in turn; t with {self.degrees:.1f} degrees of freedom"


def paired_rise(before: np.ndarray, after: np.ndarray, tokens: np.ndarray, sources: Sequence[str], *, error: float = ERROR) -> Interval:
    """The rise of documents whose summed losses were `before` and are `after`, all (documents,), with its interval. Raises ValueError below two clusters."""
    by = "source" if len(set(sources)) > 1 else "document"
    names = {name: i for i, name in enumerate(dict.fromkeys(sources))}
    group = np.array([names[source] for source in sources]) if by == "source" else np.arange(len(sources))
    count = int(group.max()) + 1 if len(group) else 0
    if count < 2:
        raise ValueError(f"a rise needs at least two documents to have an interval, found {len(sources)}; give more general text")
    rises = np.bincount(group, np.asarray(after, float) - np.asarray(before, float), count)
    sizes = np.bincount(group, np.asarray(tokens, float), count)
    rise = float(rises.sum() / sizes.sum())
    without = (rises.sum() - rises) / (sizes.sum() - sizes)
    spread = math.sqrt((count - 1) / count * float(((without - rise) ** 2).sum()))
    made = Interval(rise, spread, rise, rise, error, by, count, float(sizes.sum() ** 2 / (sizes**2).sum()), len(sources))
    width = t_quantile(1 - error / 2, made.degrees) * spread
    within = spread if by == "document" else _within(np.asarray(after, float) - np.asarray(before, float), np.asarray(tokens, float), group, rise)
    return replace(made, low=rise - width, high=rise + width, within=within)


def _within(rises: np.ndarray, tokens: np.ndarray, group: np.ndarray, rise: float) -> float:
    """Standard error of the rise over other documents of the same sources: residuals to each source's own rise (to the common one for a lone document)."""
    number, sizes = np.bincount(group), np.bincount(group, tokens)
    own = np.where(number > 1, np.bincount(group, rises) / sizes, rise)
    residuals = np.bincount(group, (rises - tokens * own[group]) ** 2)
    return math.sqrt(float((residuals * np.where(number > 1, number / np.maximum(number - 1, 1), 1.0)).sum())) / float(tokens.sum())


def t_quantile(p: float, degrees: float) -> float:
    """Quantile of Student's t for p >= 0.5 and any degrees of freedom >= 1, by bisection on its distribution function; the normal one from 10,000 degrees on,
    where the two differ by less than 1e-4 of it."""
    if degrees >= 1e4:
        return NormalDist().inv_cdf(p)
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def _t_below(t: float, degrees: float) -> float:
    """P(T < t) for t >= 0: with t = sqrt(degrees) tan(u) the density is a constant times cos(u)^(degrees - 1); Simpson's rule."""
    u = np.linspace(0, math.atan(t / math.sqrt(degrees)), 401)
    values = np.cos(u) ** (degrees - 1)
    area = float((values[0] + values[-1] + 4 * values[1:-1:2].sum() + 2 * values[2:-1:2].sum()) * (u[1] - u[0]) / 3)
    return 0.5 + area * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)


def verdict(interval: Interval, budget: float) -> str:
    """met, exceeded or not shown."""
    return "met" if interval.high <= budget else "exceeded" if interval.low > budget else "not shown"


def documents_to_decide(interval: Interval, budget: float) -> int | None:
    """About how many more documents (of as many more sources) would move the budget out of the interval; None where the rise is the budget itself."""
    distance = abs(budget - interval.nats)
    if distance == 0:
        return None
    return max(0, math.ceil(interval.documents * (((interval.high - interval.nats) / distance) ** 2 - 1)))


def planned_bound(interval: Interval, check_documents: int, *, error: float) -> float:
    """The value that the check part's upper end stays below 19 times in 20, predicted from the control part's interval.

    The check has its own noise: an update chosen so that the control part's upper end just meets the budget would fail the check half of the time. So this
    is the rise, plus the check's half width, plus a high quantile of how much the two parts' upper ends differ: by documents only, since both parts hold the
    same sources; through the rise and through the width itself.
    """
    ratio = math.sqrt(interval.documents / check_documents)
    t = t_quantile(1 - error / 2, interval.degrees)
    by_source = interval.by == "source"
    through_width = t**2 / (interval.clusters if by_source else 2 * interval.degrees)
    noise = interval.within * math.hypot(1, ratio) * math.sqrt(1 + through_width)
    return interval.nats + t * interval.standard_error * (1 if by_source else ratio) + t_quantile(PLANNED, interval.degrees) * noise


def check_reach(spread: Interval, check_documents: int, budget: Budget, *, error: float) -> None:
    """Raise ValueError where the check could not show the budget even if the true rise were zero.

    `spread` is the interval of an update that costs about the budget in a random direction, which sets how far apart documents move; fine-tuning
    moves them at least as far apart (docs/budget.md), so text that fails here is too short for certain.
    """
    width = t_quantile(1 - error / 2, spread.degrees) * spread.standard_error * math.sqrt(spread.documents / check_documents)
    if width <= budget.nats:
        return
    needed = math.ceil(2 * check_documents * (width / budget.nats) ** 2)
    few = f"; its {spread.clusters} sources count for {spread.effective:.1f}, so more sources help most" if spread.by == "source" else ""
    raise ValueError(f"the general text is too short to show a budget of {budget.text} ({budget.nats:.4g} nats): half of it is kept for the check, and there "
                     f"the rise is known to +- {width:.2g} nats at best. Give about {needed} documents (found {2 * check_documents}){few}, "
                     "or a larger budget")  # fmt: skip


@dataclass
class Controller:
    """The strength that keeps the general loss at the budget, from few noisy probes of its rise and the penalty's exact energy.

    A probe of some hundred tokens may err by more than the budget, but the rise is close to proportional to the energy, which costs next to nothing: so
    all probes so far say what a unit of energy costs (sum of rises / sum of energies, the last weighing most), and the strength follows rise = that *
    energy, at probes and between them. What a unit costs is known before the first probe (`unit`): about 1 for importance in nats (it is a Fisher), for other
    importance what the random update cost that the reach was measured with (keeper.py). One imagined probe at the budget with that cost steadies the first
    real ones, and no estimate goes below half of it, which noise alone says.

    e = log(rise / target), within [-4, 1.5], and above -1 at the first look, -2 at the second: one lucky probe must not let go of everything. Near the budget
    the proportional part is gentle: an overshoot early in training, at a high learning rate, is not what is left of it in the end, and holding as hard as it
    asks for undoes the learning (LOG.md, 2026-11-26). While the budget is unused it takes the strength to start * exp(-5.6): nothing is held back. The
    integral moves within [-7, 12], by at most 0.2 down and 0.45 up at a time (anti-windup). Until the first look the strength is `start`, since the first
    steps are the wildest. `start` None: no strength is known for this importance; it is set to `price` nats of domain loss per nat of general loss, by `unit`,
    or where that is not known either, by the energy that came with the first clear rise, until which nothing is held.
    """

    target: float
    start: float | None
    unit: float | None = None
    integral: float = 0.0
    rise: float | None = None  # by energy
    rises: float = 0.0  # of the probes, discounted
    energies: float = 0.0
    price: float = 10.0
    trajectory: list[dict[str, float | None]] = field(default_factory=list)

    GAIN, UNUSED_GAIN, INTEGRAL_GAIN, KEPT = 0.5, 1.5, 0.3, 0.85
    LEAST = 0.5  # of `unit`, for a Fisher the second-order theory; of finished updates the true rise was below 0.6 of the energy once in twenty
    UNUSED = -0.4  # log(rise / target) below which the budget counts as unused: two thirds of it

    def __post_init__(self) -> None:
        if self.unit is not None:
            self.rises, self.energies = self.target, self.target / self.unit
            self.start = self.start or 2 * self.price * self.unit

    def update(self, step: int, energy: float, probe: float | None = None) -> float:
        """The strength to go on with at `energy` (sum of c * energy), where a probe may have found a rise."""
        if probe is not None:
            self.rises, self.energies = self.KEPT * self.rises + probe, self.KEPT * self.energies + energy
        self.trajectory.append({"step": step, "probe": probe, "rise": None, "strength": None})
        if self.energies > 0:
            least = self.LEAST * self.unit if self.unit is not None else -math.inf
            self.rise = max(self.rises / self.energies, least) * energy
            if self.start is None and probe is not None and energy > 0 and min(probe, self.rise) > 0.1 * self.target:
                self.start = 2 * self.price * self.rise / energy
            if self.start is not None:
                self.integral = min(12.0, max(-7.0, self.integral + self.INTEGRAL_GAIN * min(1.5, max(-0.7, self._error()))))
        self.trajectory[-1] |= {"rise": self.rise, "strength": self.strength()}
        return self.strength()

    def strength(self) -> float:
        """The strength now; 0 until a start is known."""
        if self.start is None:
            return 0.0
        error = 0.0 if self.rise is None else self._error()
        return self.start * math.exp(self.integral + self.GAIN * max(error, self.UNUSED) + self.UNUSED_GAIN * min(0.0, error - self.UNUSED))

    def _error(self) -> float:
        ratio = (self.rise or 0.0) / self.target
        return min(1.5, max(-4.0, -float(len(self.trajectory)), math.log(max(ratio, 1e-9))))

    def state(self) -> dict[str, Any]:
        """Plain data that a checkpoint holds."""
        return {**{name: getattr(self, name) for name in self.CHANGING}, "trajectory": list(self.trajectory)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name in self.CHANGING:
            setattr(self, name, state[name])
        self.trajectory = list(state["trajectory"])

    CHANGING = ("start", "integral", "rise", "rises", "energies")
