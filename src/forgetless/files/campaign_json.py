"""What `compare` writes on its way: the numbers of the base model, accuracies, the importance files
and the steps of sequences. Its results are told in compare_json.py.

    base = read_record("out/base.json", BaseMeasured)
    base.on("test").domains["sciq"].nats
    read_record("out/accuracy.json", Accuracies).tasks["piqa"].acc

Losses are in nats per token, accuracies are from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forgetless.files.measured_json import Loss
from forgetless.files.run_json import Environment
from forgetless.files.schema import Text
from forgetless.files.untrusted import JsonObject


@dataclass(frozen=True)
class PartLosses:
    """The losses of one state of a model on one part of the data, by general text and by domain."""

    general: dict[str, Loss] = field(default_factory=dict)
    domains: dict[str, Loss] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BaseMeasured:
    """base.json: the bare base model on every part.

    `made_from` is all that decides these numbers; where it is another, they are measured again.
    """

    made_from: JsonObject
    environment: Environment | None = None
    rows_trained: dict[str, int] = field(default_factory=dict)  # by domain
    validation: PartLosses
    test: PartLosses

    def on(self, part: str) -> PartLosses:
        """The losses on a part of the data, "validation" or "test"."""
        return {"validation": self.validation, "test": self.test}[part]


@dataclass(frozen=True)
class TaskAccuracy:
    """The accuracy on one task; `acc` is what a comparison shows of it."""

    task: Text
    acc: float | None = None
    acc_stderr: float | None = None
    acc_norm: float | None = None  # of answers ranked by likelihood per byte
    questions: int | None = None


@dataclass(frozen=True)
class Accuracies:
    """accuracy.json: one state of a model on some tasks, on `limit` questions of each.

    `base` is what the files of its base were (model/fingerprint.py).
    """

    model: Text | None = None
    base: Text | None = None
    limit: int | None = None
    tasks: dict[str, TaskAccuracy] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedWeight:
    """How much one weight matters: the norm of its importance."""

    name: str
    layer: int | None
    kind: str
    norm: float


@dataclass(frozen=True)
class RecordedImportance:
    """importance/LABEL-HASH.json: an importance file as it was recorded."""

    name: str
    file: str
    estimator: Any
    tier: str
    bytes: int
    seconds: Any
    tokens: Any
    weights: list[RecordedWeight]


@dataclass(frozen=True)
class StepMeasured:
    """step.json: whose a step's folder is, and what was measured once the step was done.

    `id` is a hash of all that decides the step. It is there from the start, the rest comes last.
    """

    id: Text
    settings: JsonObject = field(default_factory=dict)
    energy: float | None = None
    seconds: float | None = None  # of training
    general: dict[str, Loss] = field(default_factory=dict)
    domains: dict[str, Loss] | None = None
    accuracy: dict[str, float | None] = field(default_factory=dict)  # of domains with questions

    @property
    def done(self) -> bool:
        return self.domains is not None

    def keys(self) -> tuple[str, ...]:
        if not self.done:
            return ("id",)
        return ("id", "settings", "energy", "seconds", "general", "domains", "accuracy")
