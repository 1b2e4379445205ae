"""demo.json of the demo on a chat model: what each state of the model has learned and lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from forgetless.files.behaviours_json import BehaviourChange, Conversation
from forgetless.files.schema import Text


@dataclass(frozen=True)
class ChatState:
    """One state of the model.

    `learning` is the fall of the loss on the guild's held-out conversations and `divergence` that
    from the base on its own answers, in nats per token, means over seeds. `behaviours` are rates of
    answers, from 0 to 1, by what is counted; they are of the first seed. `seconds` are of training.
    """

    learning: float | None = None
    divergence: float | None = None
    behaviours: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class ChatDemo:
    """All of demo.json; the seconds are those of the whole demo."""

    model: str
    states: dict[str, ChatState]
    seconds: float


@dataclass(frozen=True)
class JudgedRun:
    """said/ID.json: how the tuned model of a run behaves beside its base, and all it has said.

    `asked` is how both were asked; where it is another, they are asked again.
    """

    asked: list[int]
    behaviours: list[BehaviourChange] = field(default_factory=list)
    not_judged: list[Text] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    said: dict[str, Text | None] = field(default_factory=dict)
