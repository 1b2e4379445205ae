"""The setting of each method that is tested, chosen by the runs on the validation part.

As a curve, a run is its points, (learning, forgetting on one text), by rising scale.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from forgetless.compare.experiment import Chosen, Experiment
from forgetless.compare.frontier import Curve, choice_key
from forgetless.files.compare_json import TrialRun
from forgetless.files.measured_json import Change
from forgetless.options.option import Given

# The level of plain's learning at which settings are chosen and the verdict is given: scaled back
# that far, an update still does nearly all that it was trained for.
CHOSEN_AT = 0.95


def nats_of(change: Change | None) -> float:
    """A change in nats per token. Raises ValueError where a run that is done does not tell it."""
    if change is None or change.nats is None:
        raise ValueError(
            "expected a loss at every point of a run that is done, found none; its run.json is "
            "damaged: delete it, and the same command runs it again"
        )
    return change.nats


def curve(run: TrialRun, text: str) -> Curve:
    """(learning, forgetting on `text`) of a run by rising scale."""
    points = sorted(run.points, key=lambda point: point.scale or 0.0)
    return [(nats_of(point.learning), nats_of(point.forgetting[text])) for point in points]


def _setting_of(run: TrialRun) -> str:
    return repr(sorted(run.settings.items(), key=lambda item: item[0]))


def by_setting(runs: Sequence[TrialRun]) -> list[list[TrialRun]]:
    """Runs of one method, grouped by setting: the seeds of each."""
    groups: dict[str, list[TrialRun]] = defaultdict(list)
    for run in runs:
        if run.status == "done":
            groups[_setting_of(run)].append(run)
    return list(groups.values())


def reference_learning(runs: Sequence[TrialRun]) -> float | None:
    """What plain fine-tuning learns, whole, at its best setting: mean over seeds."""
    return max(
        (
            statistics.fmean(
                curve(run, next(iter(run.points[0].forgetting)))[-1][0] for run in group
            )
            for group in by_setting(runs)
        ),
        default=None,
    )


def choose(experiment: Experiment, runs: Sequence[TrialRun]) -> Chosen:
    """The setting of each (method, domain) to be tested: least forgetting of the recorded kind of
    text at 95 % of plain's learning, scaled variants included; where none reaches it, the one that
    learns most. For plain itself: the one that learns most.
    """
    chosen: dict[tuple[str, str], Given] = {}
    for domain in experiment.domains:
        here = [run for run in runs if run.domain == domain and run.part == "validation"]
        reference = reference_learning([run for run in here if run.method == experiment.reference])
        if reference is None:
            continue
        for method in experiment.methods:
            groups = by_setting([run for run in here if run.method == method])
            curves = [[curve(run, experiment.recorded) for run in group] for group in groups]
            if groups and method == experiment.reference:
                best = max(
                    range(len(groups)), key=lambda k: statistics.fmean(c[-1][0] for c in curves[k])
                )
            elif groups:
                best = min(
                    range(len(groups)), key=lambda k: choice_key(curves[k], CHOSEN_AT * reference)
                )
            else:
                continue
            chosen[method, domain] = groups[best][0].settings
    return chosen
