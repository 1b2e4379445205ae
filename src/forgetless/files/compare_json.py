"""compare.json: what `compare` makes of its runs, all that a report needs; and the run.json of each
of these runs, which is a `TrialRun`.

    comparison = read_record("out/compare.json", Comparison)
    comparison.equal_learning["sciq"]["wiki"][0].forgetting
    trial = read_record("out/runs/ID/run.json", TrialRun)

Losses, forgetting and learning are in nats per token, times in seconds, sizes in bytes; accuracies
are from 0 to 1. A *level* is a fraction of what plain fine-tuning learns. The last keys, from
`kind` on, are of a report's own making, where it shows a single run as a comparison of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forgetless.files.behaviours_json import BehaviourChange, KindDivergence
from forgetless.files.budget_json import BudgetReport
from forgetless.files.gate_json import Gate
from forgetless.files.measured_json import DIVERGENCE, Change, MovedWeight
from forgetless.files.run_json import Environment, LogEntry, Transfer
from forgetless.files.schema import LEFT_OUT, Level, Text, key
from forgetless.files.untrusted import JsonObject

# What a run with a result holds after its points.
RESULT_KEYS = (
    "energy",
    "seconds",
    "peak_memory_bytes",
    "extra_data",
    "file_bytes",
    "trainable_parameters",
    "moved",
    "log",
    "environment",
)


@dataclass(frozen=True)
class Score:
    """The accuracy on some questions before and after."""

    before: float | None = None
    after: float | None = None
    standard_error: float | None = None  # of the accuracy after
    questions: int | None = None


@dataclass(frozen=True)
class TrialPoint:
    """What a finished update does at one scale."""

    scale: float | None = None
    learning: Change | None = None
    accuracy: Score | None = None  # on the domain
    accuracy_general: dict[str, Score | None] | None = None  # on the other tasks
    forgetting: dict[str, Change | None] = field(default_factory=dict)  # by general text


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One run of a comparison: a method at a setting on a domain, with a seed.

    `status` is "done", "failed" or "out of memory"; without a result there are no points.
    """

    id: Text | None = None
    method: str
    domain: Text | None = None
    settings: JsonObject = field(default_factory=dict)
    part: Text | None = None  # of the data: "validation" or "test"
    seed: int | None = None
    status: Text | None = None
    error: Text | None = None
    points: list[TrialPoint] = field(default_factory=list)
    energy: float | None = None
    seconds: float | None = None  # of preparing and training
    peak_memory_bytes: int | None = None
    extra_data: Text | None = None
    file_bytes: int | None = None  # of the importance file
    trainable_parameters: int | None = None
    moved: list[MovedWeight] | None = None
    log: list[LogEntry] = field(default_factory=list)
    environment: Environment | None = None
    wall_seconds: float | None = None  # of everything, evaluation too
    chosen: Any = field(default=None, metadata=LEFT_OUT)  # whether its settings were; by compare

    @property
    def done(self) -> bool:
        """Whether it has a result; a status that is not told says so too."""
        return self.status in (None, "", "done")

    def keys(self) -> tuple[str, ...]:
        about = ("id", "method", "domain", "settings", "part", "seed", "status", "error", "points")
        return (*about, *(RESULT_KEYS if self.done else ("log", "moved")), "wall_seconds", "chosen")


@dataclass(frozen=True)
class Progress:
    """How many runs are over, of how many."""

    done: int | None = None
    of: int | None = None
    failed: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class TextBefore:
    """What the base model loses on a general text."""

    nats: float | None = None
    standard_error: float | None = None
    perplexity: float | None = None
    accuracy: float | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class DomainBefore:
    """What the base model loses on a domain's held-out data, and knows of its questions."""

    nats: float | None = None
    standard_error: float | None = None
    perplexity: float | None = field(default=None, metadata=LEFT_OUT)
    accuracy: float | None = None


@dataclass(frozen=True)
class GeneralText:
    """A general text that forgetting is measured on; `kind` says whether it is of the kind that
    importance was "recorded" on. `of` is "divergence" where the text is what the base says itself,
    and forgetting the divergence from it, not a loss that rose.
    """

    name: str
    kind: Text | None = None
    documents: int | None = None
    tokens: int | None = None
    before: TextBefore | None = None
    of: Text | None = field(default=None, metadata=LEFT_OUT)

    @property
    def diverges(self) -> bool:
        """Whether forgetting on it is a divergence from the base, and not a loss that rose."""
        return self.of == DIVERGENCE


@dataclass(frozen=True)
class DomainData:
    """The data of a domain."""

    name: str
    rows: int | None = None
    rows_trained: int | None = None
    before: DomainBefore | None = None


@dataclass(frozen=True)
class ComparedMethod:
    """A method as it takes part: its label, its family, and what it needs beside the data."""

    name: str
    label: Text | None = None
    family: Text | None = None
    needs: Text | None = None
    trials: int | None = None
    chosen: JsonObject = field(default_factory=dict)  # the settings chosen for each domain


@dataclass(frozen=True)
class FrontierPoint:
    """One setting at one scale: means over seeds."""

    run: Text | None = None
    scale: float | None = None
    seeds: int | None = None
    learning: float | None = None
    learning_error: float | None = None
    forgetting: float | None = None
    forgetting_error: float | None = None
    on_frontier: Any = None  # whether no point of any method is better


@dataclass(frozen=True)
class MethodFrontier:
    """All points of a method on one domain and text, and the area under them."""

    points: list[FrontierPoint] = field(default_factory=list)
    area: float | None = None
    area_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class EqualLearning:
    """What a method forgets where it has learned as much as the others."""

    method: str
    level: Level = field(metadata=key("share"))
    part: Text | None = None
    learning_nats: float | None = None
    forgetting: float | None = None
    standard_error: float | None = None
    seeds: int | None = None
    reached: int | None = None  # by how many seeds
    status: Text | None = None


@dataclass(frozen=True)
class NoiseFloor:
    """How much plain fine-tuning varies over seeds."""

    learning: float | None = None
    forgetting: dict[str, float | None] = field(default_factory=dict)
    how: Text | None = None


@dataclass(frozen=True)
class Difference:
    """Forgetting of method `a` minus that of `b` at equal learning."""

    domain: Text | None = None
    text: Text | None = None
    level: float | None = field(default=None, metadata=key("share"))
    a: Text | None = None
    b: Text | None = None
    difference: float | None = None
    standard_error: float | None = None
    ratio: float | None = None
    beyond_noise: bool | None = None


@dataclass(frozen=True)
class WeightImportance:
    """How much one weight matters (the norm of its importance), and how its layer is held."""

    name: Text | None = None
    layer: int | None = None
    kind: Text | None = None
    norm: float | None = None
    coefficient: float | None = None


@dataclass(frozen=True)
class ImportanceFile:
    """An importance file of a comparison."""

    name: Text | None = None
    file: Text | None = None
    estimator: Text | None = None
    tier: Text | None = None
    bytes: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    weights: list[WeightImportance] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """What models say to a prompt: "base" is the model before tuning, others are methods."""

    domain: Text | None = None
    prompt: Text | None = None
    reference: Text | None = None
    outputs: dict[str, Text | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparedSequence:
    """One method through a sequence of domains: the loss on every domain before and after each
    step, and the rise on general texts after each.
    """

    name: Text | None = None
    method: Text | None = None
    seed: int | None = None
    domains: list[Text] = field(default_factory=list)
    rows: list[Text] | None = field(default=None, metadata=LEFT_OUT)
    matrix: list[list[float | None]] = field(default_factory=list)
    accuracy: list[list[float | None]] | None = None
    accuracy_transfer: Transfer | None = None
    general: dict[str, list[float | None] | None] = field(default_factory=dict)
    error: Text | None = None
    average: float | None = None
    backward_transfer: float | None = None
    forward_transfer: float | None = None


@dataclass(frozen=True)
class Measure:
    """Something that was measured before and after a single run."""

    name: Text
    unit: Text = ""
    before: float | None = None
    after: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class PlainRun:
    """What plain fine-tuning on the same data learned and lost, beside a single run."""

    name: Text
    learning: Change | None = None
    forgetting: Change | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A whole comparison. What is not there is empty, so that a report leaves it out."""

    format: Any = 1
    title: Text = ""
    model: Text = ""
    created: str = ""
    environment: Environment | None = None
    experiment: Any = ""  # the text of the experiment's file, or a run's options
    settings: JsonObject = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    reference: str = "plain"
    texts: list[GeneralText] = field(default_factory=list)
    domains: list[DomainData] = field(default_factory=list)
    methods: list[ComparedMethod] = field(default_factory=list)
    runs: list[TrialRun] = field(default_factory=list)
    frontier: dict[str, dict[str, dict[str, MethodFrontier | None] | None] | None] = field(
        default_factory=dict
    )
    equal_learning: dict[str, dict[str, list[EqualLearning] | None] | None] = field(
        default_factory=dict
    )
    noise: dict[str, NoiseFloor | None] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    importance: list[ImportanceFile] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sequences: list[ComparedSequence] | None = None
    verdict: list[Text] = field(default_factory=list)
    kind: Text = field(default="comparison", metadata=LEFT_OUT)
    notes: list[Text] = field(default_factory=list, metadata=LEFT_OUT)
    budget: BudgetReport | None = field(default=None, metadata=LEFT_OUT)
    gate: Gate | None = field(default=None, metadata=LEFT_OUT)
    measures: list[Measure] = field(default_factory=list, metadata=LEFT_OUT)
    behaviours: list[BehaviourChange] = field(default_factory=list, metadata=LEFT_OUT)
    not_judged: list[Text] = field(default_factory=list, metadata=LEFT_OUT)
    divergence_by_kind: list[KindDivergence] = field(default_factory=list, metadata=LEFT_OUT)
    plain: PlainRun | None = field(default=None, metadata=LEFT_OUT)
