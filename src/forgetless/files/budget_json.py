"""What run.json says of a forgetting budget: the verdict, the check on text that nothing was chosen
on or the prediction, what other fractions of the update and other budgets would have bought, and
what the controller did while training.

Rises and learning are in nats per token. `way` is how an update is made smaller: "shrink", along
importance, or "scale". A missing number is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forgetless.files.measured_json import INTERVAL_KEYS, Change, Interval
from forgetless.files.schema import Text, key
from forgetless.files.untrusted import JsonObject

# What run.json has of a budget whose rise was measured.
CHECKED_KEYS = (
    "verdict",
    "control",
    "check",
    "checks",
    "how",
    "documents_to_decide",
    "learning_per_nat",
)
# What run.json has of a budget whose rise was predicted.
PREDICTED_KEYS = (
    "verdict",
    "predicted",
    "calibration",
    "check",
    "checks",
    "how",
    "learning_per_nat",
)
# What both of them hold after that.
BUDGET_KEYS = (
    "budget",
    "budget_nats",
    "way",
    "share",
    "mu",
    "promised",
    "learning",
    "learning_on",
    "curve",
    "each",
    "others",
)


@dataclass(frozen=True)
class SourceCheck(Interval):
    """What the check of a budget said of one source of text."""

    verdict: Text | None = None

    def keys(self) -> tuple[str, ...]:
        return ("verdict", *INTERVAL_KEYS)


@dataclass(frozen=True)
class BudgetCheck(SourceCheck):
    """The rise of the finished update on text that nothing was chosen on; in a sequence, that of
    the source which is nearest to the budget.
    """

    way: Text | None = None
    fraction: float | None = field(default=None, metadata=key("share"))
    on: Text | None = None  # the source
    each: dict[str, SourceCheck | None] | None = None  # every source, in a sequence

    def keys(self) -> tuple[str, ...]:
        return ("way", "share", "verdict", "on", "each", *INTERVAL_KEYS)


@dataclass(frozen=True)
class Bought:
    """What a budget buys: how the update is made smaller, how far, and what is still learned."""

    way: Text | None = None  # "shrink" along importance, or "scale"
    fraction: float | None = field(default=None, metadata=key("share"))  # of the update
    mu: float | None = None  # of a shrunk update
    learning: float | None = None


@dataclass(frozen=True)
class CurvePoint:
    """One fraction of the update: its rise on the control part, and the bound that was planned for
    the check.
    """

    way: Text | None = None
    fraction: float | None = field(default=None, metadata=key("share"))
    mu: float | None = None
    rise: Interval | None = None
    bound: float | None = None
    worst: Text | None = None  # the source whose bound it is
    learning: float | None = None
    learning_standard_error: float | None = None


@dataclass(frozen=True)
class ControllerLook:
    """What the controller saw at one step of training, and the strength of the pull and the weight
    of the divergence that followed.
    """

    step: int | None = None
    probe: float | None = None
    rise: float | None = None
    strength: float | None = None
    kl_weight: float | None = None  # only where the budget sets it

    def keys(self) -> tuple[str, ...]:
        keys = ("step", "probe", "rise", "strength")
        return keys if self.kl_weight is None else (*keys, "kl_weight")


@dataclass(frozen=True)
class ProbeCosts:
    """How often the probe looked while training, at how much text, and what that cost."""

    every: int | None = None
    pieces: int | None = None
    seconds: float | None = None
    train_seconds: float | None = None


@dataclass(frozen=True)
class PredictedRise:
    """A rise by an importance file's calibration; `bound` is that of 19 in 20 such updates."""

    nats: float | None = None
    percent: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class CalibrationUsed:
    """How well the calibration knows what energy costs, and what it was made of."""

    cost: float | None = None
    error: float | None = None
    factor: float | None = None
    updates: int | None = None
    data: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class BudgetReport:
    """What became of a forgetting budget: the verdict, the check or the prediction, what each way
    of making the update smaller and each other budget would have bought, and what the controller
    did while training.
    """

    verdict: Text | None = None
    control: Interval | None = None
    check: BudgetCheck | None = None
    checks: list[BudgetCheck] = field(default_factory=list)
    how: Text | None = None
    documents_to_decide: int | None = None
    predicted: PredictedRise | None = None
    calibration: CalibrationUsed | None = None
    learning_per_nat: float | None = None
    budget: Text | None = None
    budget_nats: float | None = None
    way: Text | None = None
    fraction: float | None = field(default=None, metadata=key("share"))
    mu: float | None = None
    promised: float | None = None
    learning: Change | None = None
    learning_on: Text | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    each: dict[str, Bought | None] = field(default_factory=dict)
    others: dict[str, Bought | None] = field(default_factory=dict)
    trajectory: list[ControllerLook] | None = None  # None where nothing was trained
    probe: ProbeCosts | None = None
    overlap: Any = None  # of the general text with the rows that were trained on

    def keys(self) -> tuple[str, ...]:
        predicted = self.predicted is not None
        result = (*(PREDICTED_KEYS if predicted else CHECKED_KEYS), *BUDGET_KEYS)
        if self.trajectory is None:
            return result
        return (*result, "trajectory", "probe", *(() if predicted else ("overlap",)))
