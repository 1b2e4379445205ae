"""What is measured of a model, as run.json and compare.json hold it: losses on text with what is
needed to pair them by document, their changes, accuracies, and how far each weight moved.

Losses are in nats per token. A missing number is null.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forgetless.files.schema import LEFT_OUT, REST, Text, key

# What an interval is of where it is of no loss.
DIVERGENCE = "divergence"
# The keys of an interval, in the order of the file.
INTERVAL_KEYS = (
    "nats",
    "percent",
    "standard_error",
    "low",
    "high",
    "level",
    "by",
    "clusters",
    "effective_clusters",
    "documents",
)


# Numbers of a task that count its questions.
COUNTS = ("questions", "sample_len")


@dataclass(frozen=True)
class Loss:
    """A loss on some text, with what is needed to pair it by document with a later one."""

    nats: float | None = None
    standard_error: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tokens: int | None = None
    documents: int | None = None
    nats_by_document: list[float | None] | None = None
    tokens_by_document: list[int | None] | None = None
    source_by_document: list[int | None] | None = None  # None where all are of one source


@dataclass(frozen=True)
class Divergence(Loss):
    """The divergence of a model from its base on the base's own answers, in nats per token."""

    kind_by_document: list[str] | None = None


@dataclass(frozen=True)
class Interval:
    """How much a loss rose (forgetting) or fell (learning), paired by document, with its interval.

    `by` says what was left out in turn for the interval: "source" or "document". `of` is
    "divergence" where that rose, from 0, and not a loss.
    """

    nats: float | None = None
    percent: float | None = field(default=None, metadata=LEFT_OUT)  # of perplexity; of a rise
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = field(default=None, metadata=key("level"))
    by: Text | None = None
    clusters: int | None = None
    effective_clusters: float | None = None
    documents: int | None = None
    of: Text | None = field(default=None, metadata=LEFT_OUT)

    @property
    def diverged(self) -> bool:
        """Whether it is a divergence from the base on its own answers, and not a loss that rose."""
        return self.of == DIVERGENCE


@dataclass(frozen=True)
class Change:
    """A change without its interval, as it stands where there are many."""

    nats: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class ScoreChange:
    """How an accuracy changed, paired by question; `low` and `high` hold 95 % of the time.

    `lost` and `gained` count the questions that were right before and not after, and the other way
    round, and `p` is McNemar's exact test of them; null where an answer is not right or wrong.
    """

    change: float | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    questions: int | None = None
    lost: int | None = None
    gained: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Scores:
    """The accuracies of a task and their standard errors, by the names that lm-eval uses (acc,
    acc_stderr, acc_norm, ...), and the loss on the right answers where it is known.

    `items` has the score of each question for the accuracies that are its mean, `changes` how they
    changed since before. `chat_template`: the questions were put through the model's.
    """

    numbers: dict[str, float | None] = field(default_factory=dict, metadata=REST)
    answer_loss: Loss | None = field(default=None, metadata=LEFT_OUT)
    items: dict[str, list[float | None]] | None = field(default=None, metadata=LEFT_OUT)
    changes: dict[str, ScoreChange] | None = field(default=None, metadata=LEFT_OUT)
    chat_template: bool | None = field(default=None, metadata=LEFT_OUT)

    @property
    def metrics(self) -> list[str]:
        """The names of the accuracies, without their standard errors and the count."""
        return [key for key in self.numbers if "_stderr" not in key and key not in COUNTS]


@dataclass(frozen=True)
class Measured:
    """What was measured of a model in one state: before a run, or after it.

    `own` is the divergence from the base on what the base says itself: 0 before a run.
    """

    general: Loss | None = None
    domain: Loss | None = None
    tasks: dict[str, Scores | None] = field(default_factory=dict)
    own: Divergence | None = field(default=None, metadata=LEFT_OUT)

    @property
    def anything(self) -> bool:
        """Whether anything was measured."""
        return bool(self.general or self.domain or self.tasks or self.own)


@dataclass(frozen=True)
class Changes:
    """What a run has lost and what it has learned; None where not measured.

    Forgetting is the divergence on the base's own answers where that was measured, and `general`
    then the rise of the loss on a general text; else it is that rise.
    """

    forgetting: Interval | None = None
    learning: Interval | None = None
    general: Interval | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class MeasuredDomain(Loss):
    """The loss on one domain of a sequence, and the accuracy where the domain is a task."""

    accuracy: Scores | None = None


@dataclass(frozen=True)
class MeasuredRow(Measured):
    """What is measured after a step of a sequence: the loss on every domain is in `domains`."""

    domains: dict[str, MeasuredDomain] = field(default_factory=dict)


class MeasuredInTurn(Measured):
    """What is measured in a sequence, whose domains stand in its matrix."""

    def keys(self) -> tuple[str, ...]:
        return ("general", "tasks", "domain", "own")


@dataclass(frozen=True)
class MovedWeight:
    """How far training moved one weight, how much that matters, and how its layer is held."""

    weight: Text | None = None
    layer: int | None = None
    kind: Text | None = None
    movement: float | None = None
    importance: float | None = None
    coefficient: float | None = None
