"""What run.json says of a chat model's behaviour: how often its answers did what users know, before
and after, how far each kind of answer has moved, and a few conversations to read.

A rate is from 0 to 1; a length is in tokens; a divergence is in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.files.schema import Text

# The units of a behaviour.
AS_RATE = "rate"
IN_TOKENS = "tokens"


@dataclass(frozen=True)
class BehaviourChange:
    """A behaviour before and after, over the prompts that both answers were judged on.

    `low` and `high` bound the change, at 95 %. Of a rate `lost` are the answers that were counted
    before and not after, and `gained` those after and not before; of a length they are the answers
    that became shorter and longer. `p` is how likely so uneven a split of these is, or a more
    uneven one, where either way is as likely (McNemar's exact test).
    """

    name: str
    counts: Text | None = None  # what a counted answer does, in words
    better: Text | None = None  # "higher", "lower", or None where neither is wanted
    unit: Text = AS_RATE
    prompts: int | None = None
    before: float | None = None
    after: float | None = None
    low: float | None = None
    high: float | None = None
    lost: int | None = None
    gained: int | None = None
    p: float | None = None

    @property
    def change(self) -> float | None:
        if self.before is None or self.after is None:
            return None
        return self.after - self.before

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval of the change leaves out 0."""
        if self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """What a change beyond the noise is for the user: "better", "worse", or "other" where
        neither way is wanted; "" within the noise.
        """
        if not self.beyond_noise:
            return ""
        if self.better is None:
            return "other"
        rose = self.low is not None and self.low > 0
        return "better" if rose == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class KindDivergence:
    """The divergence of the answers to one kind of prompt."""

    kind: Text | None = None
    nats: float | None = None
    standard_error: float | None = None
    answers: int | None = None


@dataclass(frozen=True)
class Conversation:
    """One prompt with what the base and the tuned model say to it.

    `chosen` says why it stands here, and `nats` is the divergence of the tuned model on the base's
    answer.
    """

    kind: Text | None = None
    chosen: Text | None = None
    nats: float | None = None
    prompt: Text | None = None
    before: Text | None = None
    after: Text | None = None
