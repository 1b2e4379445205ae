"""The finish: from an update as trained to the largest part of it that keeps the budget, and the
check that says so.

    scan     the rise on the control part and the learning at many fractions of the update, along
             each way of making it smaller (scan.py, ways.py)
    choose   the most learning among fractions whose planned bound keeps the budget: the value below
             which the check's upper end will be 19 times in 20
    check    the check part, measured at the chosen fraction only. Not met: one fallback to a
             smaller fraction, chosen on the control part, and a second check; each has half of the
             error probability
    sources  in a sequence of domains the bound and the check are those of the worst source: the
             general text or an earlier domain

Costs 2 to 12 evaluations of the control part and of the domain data along each way, and one or two
of the check part.

    report = keep_budget(baseline, model, ways_of(update, importance), learning)
    report.verdict                   # "met", "not shown" or "exceeded"
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import nn

from forgetless.budget.baseline import Baseline
from forgetless.budget.budget import Budget, documents_to_decide, verdict_on
from forgetless.budget.learning import Learning
from forgetless.budget.scan import (
    EACH,
    FRACTIONS,
    NO_UPDATE,
    OTHERS,
    REFINED,
    Planner,
    Scan,
    ScanPoint,
    bought,
    choose_point,
)
from forgetless.budget.ways import Ways
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.evaluate.rise import Rise
from forgetless.files.budget_json import (
    BudgetCheck,
    BudgetReport,
    PredictedRise,
    SourceCheck,
)
from forgetless.files.measured_json import DIVERGENCE, Change, Interval
from forgetless.files.schema import GENERAL
from forgetless.importance.calibration import Calibration
from forgetless.model import distributed
from forgetless.report.numbers import perplexity_percent
from forgetless.report.terminal import progress

logger = logging.getLogger("forgetless")
# The verdicts, each worse than the one before.
WORSE = ("met", "not shown", "exceeded")


class Forecaster(Planner, Protocol):
    """A planner by a calibration."""

    @property
    def calibration(self) -> Calibration: ...


def keep_budget(
    baseline: Baseline,
    model: nn.Module,
    ways: Ways,
    learning: Learning | None,
    *,
    among: Sequence[str] | None = None,
) -> BudgetReport:
    """Scan every way, choose among those named by `among` (default: all), check, fall back at most
    once along the chosen way.

    Leaves the model at the fraction that was checked last; returns what run.json holds under
    `budget`.
    """
    with _counted(ways) as counted:
        return _kept_budget(baseline, model, counted, learning, among)


def _kept_budget(
    baseline: Baseline,
    model: nn.Module,
    ways: Ways,
    learning: Learning | None,
    among: Sequence[str] | None,
) -> BudgetReport:
    limit = baseline.budget.nats
    scans = _scanned(baseline, model, ways, learning)
    points = [point for way in among or ways for point in scans[way].points]
    nothing = _nothing(baseline, model, ways)
    chosen = choose_point(points, limit, nothing)
    rises, check = _check_point(baseline, model, ways, chosen)
    checks = [check]
    if check.verdict != "met":
        logger.warning(
            "the check part does not show the budget at fraction %.3f of the update (%s): one "
            "fallback to a smaller one",
            chosen.fraction,
            check.verdict,
        )
        # As much smaller as the check missed by, and a tenth.
        aim = 0.9 * limit * limit / rises[str(check.on)].high
        chosen = choose_point(scans[chosen.way].below(chosen.fraction), aim, nothing)
        rises, check = _check_point(baseline, model, ways, chosen)
        checks.append(check)
    rise = rises[str(check.on)]
    undecided = check.verdict == "not shown"
    report = BudgetReport(
        verdict=check.verdict,
        control=_interval_of(baseline, chosen.rise),
        check=check,
        checks=checks,
        how=rise.how(),
        documents_to_decide=documents_to_decide(rise, limit) if undecided else None,
        learning_per_nat=_per_nat(chosen, rises[GENERAL].nats),
    )
    return _with_choice(report, baseline.budget, chosen, scans, points, learning)


@contextlib.contextmanager
def _counted(ways: Ways) -> Iterator[Ways]:
    """The ways with one progress for all: each fraction that one of them is asked for is then
    measured. There are at most so many, mostly fewer.
    """
    most = len(ways) * (len(FRACTIONS) + REFINED) + 1
    label = "finding what keeps the budget"
    with progress(label, most, unit="fraction", shown=distributed.first()) as bar:

        def counting(apply: Callable[[float], None]) -> Callable[[float], None]:
            def applied(fraction: float) -> None:
                bar.advance()
                apply(fraction)

            return applied

        yield {way: counting(apply) for way, apply in ways.items()}


def _interval_of(baseline: Baseline, rise: Rise) -> Interval:
    """The rise as a file has it, which says where it is a divergence."""
    own = isinstance(baseline.control, PairedAnswers)
    return replace(rise.record(), of=DIVERGENCE if own else None)


def keep_predicted(
    forecast: Forecaster, model: nn.Module, ways: Ways, learning: Learning | None
) -> BudgetReport:
    """As `keep_budget` with a `predicted.Forecast` in place of the baseline: nothing is measured
    but the learning, so nothing can be checked.
    """
    with _counted(ways) as counted:
        scans = _scanned(forecast, model, counted, learning)
    points = [point for scan in scans.values() for point in scan.points]
    chosen = choose_point(points, forecast.budget.nats, replace(NO_UPDATE, way=list(ways)[-1]))
    ways[chosen.way](chosen.fraction)
    nats = chosen.rise.nats
    report = BudgetReport(
        verdict="predicted",
        predicted=PredictedRise(nats, perplexity_percent(nats), chosen.bound),
        calibration=forecast.calibration.used_record(),
        how=forecast.calibration.describe(),
        learning_per_nat=_per_nat(chosen, nats),
    )
    return _with_choice(report, forecast.budget, chosen, scans, points, learning)


def _scanned(
    planner: Planner, model: nn.Module, ways: Ways, learning: Learning | None
) -> dict[str, Scan]:
    """Every way, each from the same whole update, which is measured once."""
    scans: dict[str, Scan] = {}
    whole: ScanPoint | None = None
    for way, apply in ways.items():
        scans[way] = Scan(planner, model, way, apply, learning, whole)
        whole = whole or scans[way].points[0]
    return scans


def _nothing(baseline: Baseline, model: nn.Module, ways: Ways) -> ScanPoint:
    """The model without the update, along the last way. In a sequence, the steps before have spent
    some of the budget.
    """
    nothing = replace(NO_UPDATE, way=list(ways)[-1])
    if not baseline.moved:
        return nothing
    ways[nothing.way](0.0)
    rise, bound, worst = baseline.planned(model, error=EACH)
    return replace(nothing, rise=rise, bound=bound, worst=worst)


def _check_point(
    baseline: Baseline, model: nn.Module, ways: Ways, chosen: ScanPoint
) -> tuple[dict[str, Rise], BudgetCheck]:
    """The rise of every source's check part at the chosen point, and what the worst of them says of
    the budget.
    """
    limit = baseline.budget.nats
    ways[chosen.way](chosen.fraction)
    rises = baseline.checked(model, error=EACH)
    on = max(
        rises, key=lambda name: (WORSE.index(verdict_on(rises[name], limit)), rises[name].high)
    )
    each: dict[str, SourceCheck | None] | None = None
    if baseline.guards:
        each = {
            name: SourceCheck(**vars(rise.record()), verdict=verdict_on(rise, limit))
            for name, rise in rises.items()
        }
    check = BudgetCheck(
        **vars(rises[on].record()),
        verdict=verdict_on(rises[on], limit),
        way=chosen.way,
        fraction=chosen.fraction,
        on=on,
        each=each,
    )
    return rises, check


def _with_choice(
    report: BudgetReport,
    budget: Budget,
    chosen: ScanPoint,
    scans: Mapping[str, Scan],
    points: Sequence[ScanPoint],
    learning: Learning | None,
) -> BudgetReport:
    """The part of the report that is the same whether the rise was measured or predicted."""
    gained = chosen.learning
    return replace(
        report,
        budget=budget.text,
        budget_nats=budget.nats,
        way=chosen.way,
        fraction=chosen.fraction,
        mu=chosen.mu,
        promised=chosen.bound,
        learning=None if gained is None else Change(**gained.estimate()),
        learning_on=None if learning is None else learning.name,
        curve=[point.record() for scan in scans.values() for point in scan.points],
        each={way: bought(scan.points, budget.nats) for way, scan in scans.items()},
        others={f"{other:g}%": bought(points, math.log1p(other / 100)) for other in OTHERS},
    )


def _per_nat(point: ScanPoint, rise: float) -> float | None:
    """Learning for each nat of forgetting; None where nothing was learned or lost."""
    return point.learning.nats / rise if point.learning is not None and rise > 0 else None
