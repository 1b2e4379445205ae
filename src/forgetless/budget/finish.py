"""The finish: from an update as trained to the largest one that keeps the budget, and the check
that says so.

    scan     the rise on the control part and the learning at many shares of the update (1: as
             trained, 0: the base), along each way; neither need be monotone
    choose   the most learning among shares whose planned bound keeps the budget: the value below
             which the check's upper end will be 19 times in 20
    check    the check part, measured at the chosen share only. Not met: one fallback to a smaller
             share, chosen on the control part, and a second check; each has half of the error
             probability
    sources  in a sequence of domains the bound and the check are those of the worst source: the
             general text or an earlier domain

`apply(share)` makes the model that share of the update: by scaling (`Update.scale`), or by
shrinking along importance (shrunk.py). Costs 2 to 12 evaluations of the control part and of the
domain data along each way, and one or two of the check part.

    report = keep_budget(ledger, model, ways_of(update, importance), learning)
    print("\\n".join(sentences(report)))
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from forgetless.budget.baseline import Ledger
from forgetless.budget.budget import Budget, documents_to_decide, verdict
from forgetless.budget.shrunk import Basis, Form, prepared, refactored, typical
from forgetless.evaluate.paired import Part
from forgetless.evaluate.rise import ERROR, Rise
from forgetless.files.schema import GENERAL
from forgetless.importance.calibration import Calibration
from forgetless.importance.covariance import AnyCovariance
from forgetless.importance.importance import Importance
from forgetless.model.update import Update
from forgetless.report.numbers import perplexity_percent

logger = logging.getLogger("forgetless")
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0.05)
REFINED = 3  # shares tried between the best one that keeps the budget and the next larger one
EACH = ERROR / 2  # error probability of one check: the first, and the fallback's
Ways = Mapping[
    str, Callable[[float], None]
]  # name -> a function: share -> the model with that share of its update, none of it at 0
WORSE = ("met", "not shown", "exceeded")
OTHERS = (0.5, 1.0, 2.0, 5.0)  # per cent: what other budgets would buy


class Planner(Protocol):
    """What a scan asks: a ledger, which measures, or a forecast (predicted.py)."""

    @property
    def budget(self) -> Budget: ...
    def planned(self, model: nn.Module, *, error: float) -> tuple[Rise, float, str]: ...


class Forecaster(Planner, Protocol):
    """A planner by a calibration."""

    @property
    def calibration(self) -> Calibration: ...


@dataclass(frozen=True)
class Learning:
    """Domain data with the base's losses, and what to call it."""

    part: Part
    name: str

    def of(self, model: nn.Module) -> Rise:
        """The fall of the loss, in nats per token."""
        return -self.part.rise(model, error=ERROR)


@dataclass(frozen=True)
class Point:
    """One share of the update: its rise on the control part, what the check's upper end is expected
    to stay below, and its learning.
    """

    way: str
    share: float
    rise: Rise
    bound: float
    learning: Rise | None
    worst: str = GENERAL  # whose bound it is

    def numbers(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "way": self.way,
            "share": self.share,
            "mu": self.mu,
            "rise": self.rise.numbers(),
            "bound": self.bound,
            "worst": self.worst,
            "learning": None if self.learning is None else self.learning.nats,
            "learning_standard_error": None
            if self.learning is None
            else self.learning.standard_error,
        }

    @property
    def mu(self) -> float | None:
        """Of a shrunk update."""
        return mu_of(self.share) if self.way == "shrink" and self.share > 0 else None

    @property
    def gain(self) -> float:
        """What is to be largest: learning, or the share where no domain data says better."""
        return self.share if self.learning is None else self.learning.nats


class Scan:
    """Points along one way, more of them where the budget is crossed.

    Shares that can buy nothing are left out, until `below` asks for them.
    """

    def __init__(
        self,
        ledger: Planner,
        model: nn.Module,
        way: str,
        apply: Callable[[float], None],
        learning: Learning | None,
        whole: Point | None = None,
    ):
        self.ledger, self.model, self.way, self.apply, self.learning = (
            ledger,
            model,
            way,
            apply,
            learning,
        )
        self.points = (
            [] if whole is None else [replace(whole, way=way)]
        )  # largest share first; the whole update is the same along every way
        for share in SHARES[len(self.points) :]:
            self._measure(share)
            if self._enough():
                break
        for _ in range(REFINED):
            best = choose(self.points, ledger.budget.nats)
            larger = [point.share for point in self.points if point.share > best.share]
            if not larger:
                break
            self._measure((best.share + min(larger)) / 2)

    def below(self, share: float) -> list[Point]:
        """All points below a share, those included that were left out."""
        for lower in [lower for lower in SHARES if lower < min(share, self.points[-1].share)]:
            self._measure(lower)
        return [point for point in self.points if point.share < share]

    def _measure(self, share: float) -> None:
        self.apply(share)
        rise, bound, worst = self.ledger.planned(self.model, error=EACH)
        learned = None if self.learning is None else self.learning.of(self.model)
        self.points = sorted(
            [*self.points, Point(self.way, share, rise, bound, learned, worst)],
            key=lambda point: -point.share,
        )

    def _enough(self) -> bool:
        """Whether the smallest share learns less than a larger one, and both keep the smallest
        budget that is reported on.
        """
        least = min(self.ledger.budget.nats, *(math.log1p(other / 100) for other in OTHERS))
        *larger, last = self.points
        return last.bound <= least and any(
            point.bound <= least and point.gain > last.gain for point in larger
        )


NOTHING = Point(
    "scale", 0.0, Rise(0.0, 0.0, 0.0, 0.0, EACH, "document", 0, 0.0, 0), 0.0, None
)  # the base model


def ways_of(update: Update, importance: Importance | None) -> Ways:
    """The ways to make a LoRA update smaller: along importance where there is any, and by scaling."""
    return (
        {"shrink": shrinker(update, importance), "scale": update.scale}
        if importance is not None
        else {"scale": update.scale}
    )


def shrinker(update: Update, importance: Importance) -> Callable[[float], None]:
    """A function: share -> the model with the kept update shrunk that far along importance.

    Covariances are decomposed once.
    """
    made: dict[int, tuple[AnyCovariance, Basis]] = {}
    forms: dict[str, Form] = {}

    def apply(share: float) -> None:
        if share in (0.0, 1.0):
            update.scale(share)
            return
        for weight, L, _ in update.thin_factors():
            if weight.name not in forms:
                forms[weight.name] = prepared(importance[weight.name], L.device, made)
        unit = typical([(forms[weight.name], L, R) for weight, L, R in update.thin_factors()])
        update.refactor(
            lambda weight, L, R: refactored(forms[weight.name], L, R, mu_of(share) / unit)
        )

    return apply


def mu_of(share: float) -> float:
    """The mu of shrunk.py at a share above 0: squared, because on the lab model the mildest that is
    of use is near 0.02 and that of a small budget near 100.
    """
    return ((1 - share) / share) ** 2


def choose(points: Sequence[Point], limit: float, nothing: Point = NOTHING) -> Point:
    """The point with the largest gain among those whose bound is within `limit`; `nothing`, the
    model before training, where none gains anything.
    """
    fitting = [point for point in points if point.bound <= limit and point.gain > 0]
    return max(fitting, key=lambda point: point.gain, default=nothing)


def keep_budget(
    ledger: Ledger,
    model: nn.Module,
    ways: Ways,
    learning: Learning | None,
    *,
    among: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Scan every way, choose among those named by `among` (default: all), check, fall back at most
    once along the chosen way.

    Leaves the model at the share that was checked last; returns what run.json holds under `budget`.
    """
    limit = ledger.budget.nats
    scans = _scanned(ledger, model, ways, learning)
    points = [point for way in among or ways for point in scans[way].points]
    nothing = replace(NOTHING, way=list(ways)[-1])
    if ledger.moved:  # in a sequence, the steps before have spent some of the budget
        ways[nothing.way](0.0)
        rise, bound, worst = ledger.planned(model, error=EACH)
        nothing = replace(nothing, rise=rise, bound=bound, worst=worst)
    chosen, checks = choose(points, limit, nothing), []
    for attempt in range(2):
        ways[chosen.way](chosen.share)
        rises = ledger.checked(model, error=EACH)
        on = max(
            rises, key=lambda name: (WORSE.index(verdict(rises[name], limit)), rises[name].high)
        )
        rise = rises[on]
        each = (
            {
                name: {"verdict": verdict(found, limit), **found.numbers()}
                for name, found in rises.items()
            }
            if ledger.guards
            else None
        )
        checks.append(
            {
                "way": chosen.way,
                "share": chosen.share,
                "verdict": verdict(rise, limit),
                "on": on,
                "each": each,
                **rise.numbers(),
            }
        )
        if checks[-1]["verdict"] == "met" or attempt:
            break
        logger.warning(
            "the check part does not show the budget at share %.3f (%s): one fallback to a "
            "smaller share",
            chosen.share,
            checks[-1]["verdict"],
        )
        chosen = choose(
            scans[chosen.way].below(chosen.share), 0.9 * limit * limit / rise.high, nothing
        )  # as much smaller as the check missed by, and a tenth
    return {
        "verdict": checks[-1]["verdict"],
        "control": chosen.rise.numbers(),
        "check": checks[-1],
        "checks": checks,
        "how": rise.how(),
        "documents_to_decide": documents_to_decide(rise, limit)
        if checks[-1]["verdict"] == "not shown"
        else None,
        "learning_per_nat": _per_nat(chosen, rises[GENERAL].nats),
        **_chosen(ledger.budget, chosen, scans, points, learning),
    }


def keep_predicted(
    forecast: Forecaster, model: nn.Module, ways: Ways, learning: Learning | None
) -> dict[str, Any]:
    """As `keep_budget` with a `prediction.Forecast` in place of the ledger: nothing is measured but
    the learning, so nothing can be checked.
    """
    scans = _scanned(forecast, model, ways, learning)
    points = [point for scan in scans.values() for point in scan.points]
    chosen = choose(points, forecast.budget.nats, replace(NOTHING, way=list(ways)[-1]))
    ways[chosen.way](chosen.share)
    return {
        "verdict": "predicted",
        "predicted": {
            "nats": chosen.rise.nats,
            "percent": perplexity_percent(chosen.rise.nats),
            "bound": chosen.bound,
        },
        "calibration": forecast.calibration.numbers(),
        "check": None,
        "checks": [],
        "how": forecast.calibration.describe(),
        "learning_per_nat": _per_nat(chosen, chosen.rise.nats),
        **_chosen(forecast.budget, chosen, scans, points, learning),
    }


def _scanned(
    ledger: Planner, model: nn.Module, ways: Ways, learning: Learning | None
) -> dict[str, Scan]:
    """Every way, each from the same whole update."""
    scans: dict[str, Scan] = {}
    for way, apply in ways.items():
        scans[way] = Scan(
            ledger,
            model,
            way,
            apply,
            learning,
            next((scan.points[0] for scan in scans.values()), None),
        )
    return scans


def _chosen(
    budget: Budget,
    chosen: Point,
    scans: Mapping[str, Scan],
    points: Sequence[Point],
    learning: Learning | None,
) -> dict[str, Any]:
    """The part of the report that is the same whether the rise was measured or predicted."""
    gained = chosen.learning
    return {
        "budget": budget.text,
        "budget_nats": budget.nats,
        "way": chosen.way,
        "share": chosen.share,
        "mu": chosen.mu,
        "promised": chosen.bound,
        "learning": None
        if gained is None
        else {"nats": gained.nats, "standard_error": gained.standard_error},
        "learning_on": None if learning is None else learning.name,
        "curve": [point.numbers() for scan in scans.values() for point in scan.points],
        "each": {way: _bought(scan.points, budget.nats) for way, scan in scans.items()},
        "others": {f"{other:g}%": _bought(points, math.log1p(other / 100)) for other in OTHERS},
    }


def _per_nat(point: Point, rise: float) -> float | None:
    """Learning for each nat of forgetting; None where nothing was learned or lost."""
    return point.learning.nats / rise if point.learning is not None and rise > 0 else None


def _bought(points: Sequence[Point], limit: float) -> dict[str, Any]:
    """What a budget of `limit` nats buys along `points`."""
    point = choose(points, limit)
    return {
        "way": point.way,
        "share": point.share,
        "mu": point.mu,
        "learning": 0.0
        if point is NOTHING
        else None
        if point.learning is None
        else point.learning.nats,
    }
