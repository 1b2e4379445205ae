"""What run.json says of the bounds that a tuned model was checked against, and answers.json, which
holds the answers of a base that its divergence was measured on.

A divergence or a loss is in nats per token, a rate and an accuracy from 0 to 1, a length in tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forgetless.files.schema import Text

# What a bound can be of.
OF_DIVERGENCE = "divergence"
OF_LOSS = "loss"
OF_BEHAVIOUR = "behaviour"
OF_TASK = "task"
# The verdicts, as a budget's check has them, the worst first.
EXCEEDED, NOT_SHOWN, MET = "exceeded", "not shown", "met"
# The format of answers.json that this version writes and reads.
ANSWERS_FORMAT = 1


@dataclass(frozen=True)
class JudgedBound:
    """A bound with what was measured and what that says.

    `allowed` is the largest change that keeps it, with its sign, in the unit of `change`; `low` and
    `high` bound the change at 95 %. `counted` names what `number` counts, and `more` is about how
    many more of these would decide a bound that is not shown; null where that cannot be said.
    `why` says why nothing was measured.
    """

    of: Text = ""
    name: Text = ""
    bound: Text = ""
    verdict: Text = NOT_SHOWN
    allowed: float | None = None
    before: float | None = None
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    number: int | None = None
    counted: Text = ""
    more: int | None = None
    why: Text | None = None

    @property
    def in_nats(self) -> bool:
        """Whether it is a bound on a divergence or a loss."""
        return self.of in (OF_DIVERGENCE, OF_LOSS)


@dataclass(frozen=True)
class Gate:
    """The verdict over all bounds, which is that of the worst, and whether a pipeline may go on.

    `strict`: a bound that is not shown to be kept stops it too.
    """

    tuned: Text = ""
    verdict: Text = NOT_SHOWN
    passed: bool = False
    strict: bool = False
    bounds: list[JudgedBound] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """How many of the bounds have this verdict."""
        return sum(bound.verdict == verdict for bound in self.bounds)


@dataclass(frozen=True)
class StoredAnswer:
    """An answer of a base as token ids, with the opening that it follows."""

    prompt: str
    kind: str
    ids: list[int]
    start: int
    ended: bool


@dataclass(frozen=True)
class StoredAnswers:
    """The answers of one base; `weights` is the fingerprint of its weights."""

    format: int
    model: Text
    weights: str
    answers: list[StoredAnswer]
