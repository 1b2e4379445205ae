"""What fits on a GPU: whether tuning does, and in how many passes over the text recording does.

`record` sees the weights in as few groups as fit, one pass over the text each: their sums may take
half of the memory that is free beside the model (record/observing.py), since activations, and
cutting what was summed, need the rest. Here the same rule is applied to GPUs of usual sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.importance.sizes import Planned, bytes_of_tensors, total
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.plan import PlanOptions
from forgetless.plan.sketch import Sketch
from forgetless.record.division import in_groups
from forgetless.record.sums import summed_numbers

# Memory of usual GPUs in GiB.
GPUS = (24, 48, 80)
# The fraction of a GPU's memory that is there for tensors: the rest is the driver's, the context's
# and lost in holes.
USABLE = 0.92
# More passes than this over the text nobody waits for.
MOST_PASSES = 64


@dataclass(frozen=True)
class Fits:
    """What fits on a GPU of `gib` GiB: recording in so many passes over the text, None where it
    does not fit at all; tuning or not.
    """

    gib: int
    recording_passes: int | None
    tuning: bool


def fitting_on(
    options: PlanOptions, sketch: Sketch, recording: dict[str, float], tuning: dict[str, float]
) -> list[Fits]:
    """What fits on each of GPUS, by the bytes that recording and tuning take there."""
    return [
        Fits(
            gib,
            _recording_passes(options, sketch, recording, USABLE * gib * 2**30),
            total(tuning) <= USABLE * gib * 2**30,
        )
        for gib in GPUS
    ]


def _recording_passes(
    options: PlanOptions, sketch: Sketch, recording: dict[str, float], room: float
) -> int | None:
    """The least number of passes in which recording fits into `room` bytes; None where none does.

    An estimator that cannot divide its weights sees them in one pass or not at all.
    """
    free = room - recording["model"]
    beside = total(recording) - recording["model"] - recording["sums"]
    if "groups" not in ESTIMATORS[options.estimator].reads:
        return 1 if recording["sums"] + beside <= free else None
    left = min(free / 2, free - beside)
    for groups in range(1, min(MOST_PASSES, len(sketch.weights)) + 1):
        if _largest_group(options, sketch, groups) <= left:
            return groups
    return None


def _largest_group(options: PlanOptions, sketch: Sketch, groups: int) -> float:
    """Bytes of the sums of the largest of so many groups of weights."""
    leaders = {weight.name: weight.leader for weight in sketch.weights}
    division = in_groups(sketch.weights, leaders, lambda weight: sums_of(options, [weight]), groups)
    return max(sums_of(options, group) for group in division)


def sums_of(options: PlanOptions, weights: list[Planned]) -> int:
    """Bytes of what recording sums for some weights."""
    estimator = ESTIMATORS[options.estimator]
    if estimator.tier == "f32":  # credits, and of a path the importance of the epochs before
        each = 8 if estimator.trains else 4
        return each * sum(weight.shape[0] * weight.shape[1] for weight in weights)
    if estimator.tier == "kronecker":
        return 4 * sum(summed_of(options, weight) for weight in weights)
    return bytes_of_tensors(weights, estimator.tier)


def summed_of(options: PlanOptions, weight: Planned) -> int:
    """Numbers that kronecker sums for a weight; a shared input counts for the first that reads it.

    As record does, which keeps whole covariances where a tier is asked for.
    """
    rank = None if options.tier else options.cov_rank or None
    out, into = weight.shape
    return summed_numbers(out, rank) + (summed_numbers(into, rank) if weight.leads else 0)
