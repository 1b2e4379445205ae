"""The setting of each method that is tested, chosen by the runs on the validation part.

A run of a trial is what its run.json holds. As a curve it is its points, (learning, forgetting on
one text), by rising scale.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from forgetless.compare.experiment import Experiment
from forgetless.compare.frontier import Curve, rank

# The level of plain's learning at which settings are chosen and the verdict is given: scaled back
# that far, an update still does nearly all that it was trained for.
CHOSEN_AT = 0.95
Run = dict[str, Any]


def curve(run: Run, text: str) -> Curve:
    """(learning, forgetting on `text`) of a run by rising scale."""
    points = sorted(run["points"], key=lambda point: point["scale"])
    return [(point["learning"]["nats"], point["forgetting"][text]["nats"]) for point in points]


def _setting_of(run: Run) -> str:
    return repr(sorted(run["settings"].items(), key=lambda item: item[0]))


def by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one method, grouped by setting: the seeds of each."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run["status"] == "done":
            found[_setting_of(run)].append(run)
    return list(found.values())


def reference_learning(runs: Sequence[Run]) -> float | None:
    """What plain fine-tuning learns, whole, at its best setting: mean over seeds."""
    return max(
        (
            statistics.fmean(
                curve(run, next(iter(run["points"][0]["forgetting"])))[-1][0] for run in group
            )
            for group in by_setting(runs)
        ),
        default=None,
    )


def choose(experiment: Experiment, runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, Any]]:
    """The setting of each (method, domain) to be tested: least forgetting of the recorded kind of
    text at 95 % of plain's learning, scaled variants included; where none reaches it, the one that
    learns most. For plain itself: the one that learns most.
    """
    chosen = {}
    for domain in experiment.domains:
        here = [run for run in runs if run["domain"] == domain and run["part"] == "validation"]
        reference = reference_learning(
            [run for run in here if run["method"] == experiment.reference]
        )
        if reference is None:
            continue
        for method in experiment.methods:
            groups = by_setting([run for run in here if run["method"] == method])
            curves = [[curve(run, experiment.recorded) for run in group] for group in groups]
            if groups and method == experiment.reference:
                best = max(
                    range(len(groups)), key=lambda k: statistics.fmean(c[-1][0] for c in curves[k])
                )
            elif groups:
                best = min(range(len(groups)), key=lambda k: rank(curves[k], CHOSEN_AT * reference))
            else:
                continue
            chosen[method, domain] = groups[best][0]["settings"]
    return chosen
