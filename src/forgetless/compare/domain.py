"""What the runs of a comparison say about one domain: frontier, equal learning, noise, differences.

Each is made for every general text. A point is one setting at one scale, mean over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from forgetless.compare.choice import by_setting, curve, nats_of, reference_learning
from forgetless.compare.experiment import Experiment
from forgetless.compare.frontier import (
    area,
    at_share,
    choice_key,
    difference,
    mean_and_error,
    on_frontier,
)
from forgetless.files.compare_json import (
    Difference,
    EqualLearning,
    FrontierPoint,
    MethodFrontier,
    NoiseFloor,
    TrialPoint,
    TrialRun,
)
from forgetless.files.measured_json import Change

Groups = Sequence[Sequence[TrialRun]]  # the runs of a method by setting: the seeds of each


@dataclass(frozen=True)
class ComparedDomain:
    """What the runs on one domain say, by general text; empty until plain fine-tuning has a result.

    `noise` is None until then.
    """

    frontier: dict[str, dict[str, MethodFrontier]] = field(default_factory=dict)
    equal_learning: dict[str, list[EqualLearning]] = field(default_factory=dict)
    noise: NoiseFloor | None = None
    differences: list[Difference] = field(default_factory=list)


def compare_domain(experiment: Experiment, runs: Sequence[TrialRun], domain: str) -> ComparedDomain:
    """What the runs on a domain say."""
    part = _part(experiment, runs)
    here = {
        method: [run for run in runs if run.method == method and run.part == part]
        for method in experiment.methods
    }
    reference = reference_learning(here[experiment.reference])
    if reference is None:
        return ComparedDomain()
    compared = ComparedDomain(noise=_noise(experiment, runs))
    spread = compared.noise.forgetting if compared.noise else {}
    groups = {method: by_setting(mine) for method, mine in here.items()}
    for text in _texts_of([run for mine in here.values() for run in mine], experiment):
        compared.frontier[text] = _frontier(groups, text, reference)
        rows = [
            row
            for method in groups
            for row in _levels(experiment, method, groups[method], text, reference, part)
        ]
        compared.equal_learning[text] = rows
        for gap in _differences(experiment, rows, spread.get(text)):
            compared.differences.append(replace(gap, domain=domain, text=text))
    return compared


def _frontier(
    groups: Mapping[str, Groups], text: str, reference: float
) -> dict[str, MethodFrontier]:
    """Every point of every method, whether no other is better, and the area under them."""
    points = {
        method: [point for group in mine for point in _points(group, text)]
        for method, mine in groups.items()
    }
    flat = [(p.learning or 0.0, p.forgetting or 0.0) for mine in points.values() for p in mine]
    flags = iter(on_frontier(flat))
    frontier = {}
    for method, mine in groups.items():
        flagged = [replace(point, on_frontier=next(flags)) for point in points[method]]
        frontier[method] = MethodFrontier(flagged, *_area(mine, text, reference))
    return frontier


def _area(groups: Groups, text: str, reference: float) -> tuple[float | None, float | None]:
    """The area under a method's points and its standard error over seeds; None unless every seed
    has one.
    """
    areas = [
        area([curve(group[seed], text) for group in groups], reference)
        for seed in range(min(map(len, groups), default=0))
    ]
    known = [value for value in areas if value is not None]
    if known and len(known) == len(areas):
        return mean_and_error(known)
    return None, None


def _levels(
    experiment: Experiment, method: str, groups: Groups, text: str, reference: float, part: str
) -> Iterator[EqualLearning]:
    """Forgetting at each level of plain's learning, by the setting of a method that forgets least
    there.
    """
    curves = [[curve(run, text) for run in group] for group in groups]
    for level in experiment.shares:
        wanted = level * reference
        best = min(curves, key=lambda seeds: choice_key(seeds, wanted), default=[])
        there = at_share(best, wanted)
        yield EqualLearning(method=method, level=level, part=part, **asdict(there))


def _differences(
    experiment: Experiment, rows: Sequence[EqualLearning], noise: float | None
) -> Iterator[Difference]:
    """Every method against plain at each level, where both have reached it."""
    against = experiment.reference
    at = {(row.method, row.level): row for row in rows}
    for level in experiment.shares:
        for method in experiment.methods:
            if method == against:
                continue
            gap = difference(at[method, level], at[against, level], noise)
            if gap is not None:
                yield Difference(level=level, a=method, b=against, **asdict(gap))


def _part(experiment: Experiment, runs: Sequence[TrialRun]) -> str:
    """The test part once every method that was validated has ended a run on it, plain fine-tuning
    with a result.
    """
    tried = {run.method for run in runs if run.part == "validation" and run.status == "done"}
    tested = {run.method for run in runs if run.part == "test"}
    learned = any(
        run.part == "test" and run.method == experiment.reference and run.status == "done"
        for run in runs
    )
    return "test" if learned and tried <= tested else "validation"


def _points(group: Sequence[TrialRun], text: str) -> Iterator[FrontierPoint]:
    """The points of one setting: one per scale, mean over seeds; the standard error is over seeds,
    or over documents for one.
    """
    for k, point in enumerate(group[0].points):
        learning = _over_seeds(group, k, lambda p: p.learning)
        forgetting = _over_seeds(group, k, lambda p: p.forgetting[text])
        yield FrontierPoint(group[0].id, point.scale, len(group), *learning, *forgetting)


def _over_seeds(
    group: Sequence[TrialRun], k: int, pick: Callable[[TrialPoint], Change | None]
) -> tuple[float, float | None]:
    """Mean and standard error of what `pick` takes from the k-th point of each seed."""
    changes = [pick(run.points[k]) for run in group]
    mean, error = mean_and_error([nats_of(change) for change in changes])
    if error is None and changes[0] is not None:
        error = changes[0].standard_error
    return mean, error


def _texts_of(runs: Sequence[TrialRun], experiment: Experiment) -> list[str]:
    """The general texts that all of the runs were measured on."""
    return [
        text
        for text in experiment.general
        if all(text in point.forgetting for run in runs for point in run.points)
    ]


def _noise(experiment: Experiment, runs: Sequence[TrialRun]) -> NoiseFloor:
    """How much plain fine-tuning at one setting varies over seeds (data order, initialisation)."""
    part = _part(experiment, runs)
    mine = [run for run in runs if run.method == experiment.reference and run.part == part]
    group = max(by_setting(mine), key=len, default=[])
    ends = {text: [curve(run, text)[-1] for run in group] for text in _texts_of(group, experiment)}
    return NoiseFloor(
        learning=_deviation([learned for learned, _ in next(iter(ends.values()))]),
        forgetting={text: _deviation([lost for _, lost in each]) for text, each in ends.items()},
        how=(
            f"standard deviation of {experiment.reference} over {len(group)} "
            f"seed{'s' * (len(group) != 1)} (data order and initialisation)"
        ),
    )


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
