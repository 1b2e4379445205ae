"""run.json: what `tune`, `eval`, `check` and `shrink` say of a run when it is over.

    run = read_record("run/run.json", Run)               # whichever verb wrote it
    run.forgetting.nats                           # 0.056: rise of the loss on general text
    write_record("run/run.json", TunedRun(configuration=..., ...))

One class has the fields of all verbs, for whoever reads; `TunedRun`, `EvaluatedRun`, `CheckedRun`,
`ShrunkRun` and `SequenceRun` are the same with the keys that each verb writes, in their order.
Losses, rises and learning are in nats per token, times in seconds, sizes in bytes. A missing number
is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forgetless.files.behaviours_json import BehaviourChange, Conversation, KindDivergence
from forgetless.files.budget_json import BudgetReport
from forgetless.files.gate_json import Gate
from forgetless.files.measured_json import Interval, Measured, MeasuredInTurn, MovedWeight
from forgetless.files.schema import LEFT_OUT, Text
from forgetless.files.untrusted import JsonObject

# One entry of the log of training, whose keys the trainer and its callbacks choose.
LogEntry = JsonObject
# The key in the last entry of a log that says that the loss exploded.
EXPLODED = "loss_exploded"
# The status of a run of a comparison that failed, and is tried again the next time.
FAILED = "failed"
# What every verb measures, in this order.
MEASURED_KEYS = ("before", "after", "forgetting", "learning", "general")
# What `tune` and `eval` say of a chat model's answers, after that.
ANSWERED_KEYS = ("divergence_by_kind", "behaviours", "not_judged", "conversations")


@dataclass(frozen=True)
class Environment:
    """What a run ran on, as `provenance.environment` finds it."""

    python: Text | None = None
    platform: Text | None = None
    versions: dict[str, Text | None] = field(default_factory=dict)
    device: Text | None = None
    commit: Text | None = None  # of the source tree; null where it is no git checkout
    dirty: Text | None = None  # whether the tree had changes beside its commit


@dataclass(frozen=True)
class ReplayedText:
    """The general text that a method read while tuning, as --replay named it."""

    source: Text | None = None
    sequences: int | None = None
    tokens: int | None = None
    sha256: Text | None = None


@dataclass(frozen=True)
class TrainedData:
    """The rows that were trained on; `rows_trained` leaves out those of which nothing is scored."""

    source: Text | None = None
    rows: int | None = None
    rows_trained: int | None = None
    sha256: Text | None = None


@dataclass(frozen=True)
class ImportanceUsed:
    """The importance file that a run was held by."""

    file: Text | None = None
    sha256: Text | None = None


@dataclass(frozen=True)
class Transfer:
    """Where a sequence ends on average, what later domains did to earlier ones, and what earlier
    ones did for those that were not yet learned.
    """

    average: float | None = None
    backward_transfer: float | None = None
    forward_transfer: float | None = None


@dataclass(frozen=True)
class SequenceStep:
    """One domain of a sequence, as it was learned."""

    domain: Text | None = None
    budget: BudgetReport | None = None
    verdict: Text | None = None
    energy: float | None = None
    data: TrainedData | None = None
    train_seconds: float | None = None
    importance: ImportanceUsed | None = None
    consolidated: Any = None


@dataclass(frozen=True)
class Refactored:
    """The final adapter of a sequence at the rank that was asked for."""

    rank: int | None = None
    error: float | None = None  # relative, of the update
    losses: dict[str, float | None] = field(default_factory=dict)
    general_nats: float | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceMatrix:
    """What each step of a sequence did to every domain: a row for the base model, then one after
    each step; a column per domain.
    """

    domains: list[str]
    learned: list[int] = field(default_factory=list)  # after which row each domain is learned
    rows: list[Text] = field(default_factory=list)
    matrix: list[list[float | None]]
    standard_error: list[list[float | None]] = field(default_factory=list)
    average: float | None = None
    backward_transfer: float | None = None
    forward_transfer: float | None = None
    accuracy_domains: list[str]  # those with questions, the columns of `accuracy`
    accuracy: list[list[float | None]] | None = None
    accuracy_transfer: Transfer | None = None
    # The rise of general loss since the base model, a row each.
    general: list[Interval] | None = None
    general_nats: list[float | None] | None = None
    held: JsonObject = field(default_factory=dict)  # the held-out rows of each domain
    steps: list[SequenceStep] = field(default_factory=list)
    refactored: Refactored | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of any verb."""

    configuration: JsonObject = field(default_factory=dict)
    environment: Environment | None = None
    data: TrainedData | None = None
    processes: int | None = None
    method: list[str] | None = None  # None where the verb knows no methods
    sequence: SequenceMatrix | None = None
    finished: Any = None  # what each method noted at its end
    budget: BudgetReport | None = None
    gate: Gate | None = field(default=None, metadata=LEFT_OUT)
    verdict: Text | None = None
    replay: ReplayedText | None = None
    importance: ImportanceUsed | None = None
    before: Measured | None = None
    after: Measured | None = None
    forgetting: Interval | None = None
    learning: Interval | None = None
    general: Interval | None = field(default=None, metadata=LEFT_OUT)
    divergence_by_kind: list[KindDivergence] | None = field(default=None, metadata=LEFT_OUT)
    behaviours: list[BehaviourChange] | None = field(default=None, metadata=LEFT_OUT)
    # Sentences about behaviours that were left out.
    not_judged: list[Text] | None = field(default=None, metadata=LEFT_OUT)
    conversations: list[Conversation] | None = field(default=None, metadata=LEFT_OUT)
    energy: float | None = None
    moved: list[MovedWeight] | None = None
    train_seconds: float | None = None
    prepare_seconds: float | None = None
    trainable_parameters: int | None = None
    peak_memory_bytes: int | None = None
    log: list[LogEntry] = field(default_factory=list)
    seconds: float | None = None


class TunedRun(Run):
    """A run of `forgetless tune`."""

    def keys(self) -> tuple[str, ...]:
        return (
            "configuration",
            "environment",
            "data",
            "processes",
            "method",
            "finished",
            "budget",
            "verdict",
            "replay",
            "importance",
            "before",
            "after",
            "forgetting",
            "learning",
            "general",
            *ANSWERED_KEYS,
            "energy",
            "moved",
            "train_seconds",
            "prepare_seconds",
            "trainable_parameters",
            "log",
        )


class EvaluatedRun(Run):
    """A run of `forgetless eval`."""

    def keys(self) -> tuple[str, ...]:
        return ("configuration", "environment", *MEASURED_KEYS, *ANSWERED_KEYS)


class CheckedRun(Run):
    """A run of `forgetless check`."""

    def keys(self) -> tuple[str, ...]:
        told = ("configuration", "environment", "gate", "verdict")
        return (*told, *MEASURED_KEYS, *ANSWERED_KEYS, "seconds")


class ShrunkRun(Run):
    """A run of `forgetless shrink`; without a budget it says nothing of one."""

    def keys(self) -> tuple[str, ...]:
        kept = () if self.budget is None else ("budget", "verdict")
        return ("configuration", "environment", "importance", *MEASURED_KEYS, *kept, "seconds")


@dataclass(frozen=True, kw_only=True)
class SequenceRun(Run):
    """A run of `forgetless tune` on several domains in turn."""

    before: MeasuredInTurn | None = None
    after: MeasuredInTurn | None = None

    def keys(self) -> tuple[str, ...]:
        return (
            "configuration",
            "environment",
            "method",
            "sequence",
            "importance",
            "budget",
            "verdict",
            *MEASURED_KEYS,
            "train_seconds",
            "seconds",
        )
