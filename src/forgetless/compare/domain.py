"""What the runs of a comparison say about one domain: frontier, equal learning, noise, differences.

Each is made for every general text. A point is one setting at one scale, mean over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forgetless.compare.choice import Run, by_setting, curve, reference_learning
from forgetless.compare.experiment import Experiment
from forgetless.compare.frontier import (
    area,
    at_share,
    difference,
    mean_and_error,
    on_frontier,
    rank,
)

Groups = Sequence[Sequence[Run]]  # the runs of a method by setting: the seeds of each


def compare_domain(
    experiment: Experiment, summary: dict[str, Any], runs: Sequence[Run], domain: str
) -> None:
    """Put what the runs on a domain say into the summary."""
    part = _part(experiment, runs)
    here = {
        method: [run for run in runs if run["method"] == method and run["part"] == part]
        for method in experiment.methods
    }
    summary["frontier"][domain], summary["equal_learning"][domain] = {}, {}
    reference = reference_learning(here[experiment.reference])
    if reference is None:
        return
    noise = summary["noise"][domain] = _noise(experiment, runs)
    for text in _texts_of([run for runs in here.values() for run in runs], experiment):
        groups = {method: by_setting(mine) for method, mine in here.items()}
        summary["frontier"][domain][text] = _frontier(groups, text, reference)
        rows = [
            {"method": method, "share": level, "part": part, **found}
            for method in groups
            for level, found in _levels(experiment, groups[method], text, reference)
        ]
        summary["equal_learning"][domain][text] = rows
        for gap in _differences(experiment, rows, noise["forgetting"].get(text)):
            summary["differences"].append({"domain": domain, "text": text, **gap})


def _frontier(groups: Mapping[str, Groups], text: str, reference: float) -> dict[str, Any]:
    """Every point of every method, whether no other is better, and the area under them."""
    frontier: dict[str, Any] = {}
    every: list[dict[str, Any]] = []
    for method, mine in groups.items():
        points = [point for group in mine for point in _points(group, text)]
        areas = [
            area([curve(group[seed], text) for group in mine], reference)
            for seed in range(min(map(len, mine), default=0))
        ]
        known = [value for value in areas if value is not None]
        mean, error = None, None
        if known and len(known) == len(areas):
            mean, error = mean_and_error(known)
        every += points
        frontier[method] = {"points": points, "area": mean, "area_error": error}
    flat = [(point["learning"], point["forgetting"]) for point in every]
    for point, flag in zip(every, on_frontier(flat), strict=True):
        point["on_frontier"] = flag
    return frontier


def _levels(
    experiment: Experiment, groups: Groups, text: str, reference: float
) -> Iterator[tuple[float, dict[str, Any]]]:
    """(level, forgetting there by the setting that forgets least) of a method, at each level of
    plain's learning.
    """
    curves = [[curve(run, text) for run in group] for group in groups]
    for level in experiment.shares:
        wanted = level * reference
        best = min(curves, key=lambda seeds: rank(seeds, wanted), default=[])
        yield level, at_share(best, wanted)


def _differences(
    experiment: Experiment, rows: Sequence[Mapping[str, Any]], noise: float | None
) -> Iterator[dict[str, Any]]:
    """Every method against plain at each level, where both have reached it."""
    against = experiment.reference
    at = {(row["method"], row["share"]): row for row in rows}
    for level in experiment.shares:
        for method in experiment.methods:
            if method == against:
                continue
            gap = difference(dict(at[method, level]), dict(at[against, level]), noise)
            if gap is not None:
                yield {"share": level, "a": method, "b": against, **gap}


def _part(experiment: Experiment, runs: Sequence[Run]) -> str:
    """The test part once every method that was validated has ended a run on it, plain fine-tuning
    with a result.
    """
    tried = {
        run["method"] for run in runs if run["part"] == "validation" and run["status"] == "done"
    }
    tested = {run["method"] for run in runs if run["part"] == "test"}
    learned = any(
        run["part"] == "test" and run["method"] == experiment.reference and run["status"] == "done"
        for run in runs
    )
    return "test" if learned and tried <= tested else "validation"


def _points(group: Sequence[Run], text: str) -> list[dict[str, Any]]:
    """The points of one setting: one per scale, mean over seeds; the standard error is over seeds,
    or over documents for one.
    """
    found = []
    for k, point in enumerate(group[0]["points"]):
        numbers: dict[str, Any] = {
            "run": group[0]["id"],
            "scale": point["scale"],
            "seeds": len(group),
        }
        for key, pick in (
            ("learning", lambda p: p["learning"]),
            ("forgetting", lambda p: p["forgetting"][text]),
        ):
            each = [pick(run["points"][k]) for run in group]
            mean, error = mean_and_error([value["nats"] for value in each])
            numbers |= {
                key: mean,
                f"{key}_error": each[0]["standard_error"] if error is None else error,
            }
        found.append(numbers)
    return found


def _texts_of(runs: Sequence[Run], experiment: Experiment) -> list[str]:
    """The general texts that all of the runs were measured on."""
    return [
        text
        for text in experiment.general
        if all(text in point["forgetting"] for run in runs for point in run["points"])
    ]


def _noise(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    """How much plain fine-tuning at one setting varies over seeds (data order, initialisation)."""
    part = _part(experiment, runs)
    group = max(
        by_setting(
            [run for run in runs if run["method"] == experiment.reference and run["part"] == part]
        ),
        key=len,
        default=[],
    )
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else None
    whole = {text: [curve(run, text)[-1] for run in group] for text in _texts_of(group, experiment)}
    return {
        "learning": spread([x for x, _ in next(iter(whole.values()))]),
        "forgetting": {text: spread([y for _, y in ends]) for text, ends in whole.items()},
        "how": (
            f"standard deviation of {experiment.reference} over {len(group)} "
            f"seed{'s' * (len(group) != 1)} (data order and initialisation)"
        ),
    }
