"""A conversation that two models have, each with its own history, on the same random numbers.

    talk = Talk(speakers, tokenizer, Manner(temperature=0.7))
    for speaker in talk.speakers:
        for text in talk.answer(speaker, "Name three fruits."):
            ...                          # the answer so far, growing token by token
    talk.keep("Name three fruits.", {"base": "...", "tuned": "..."})

Both models draw their n-th token with the same uniform number by inversion, so where they agree
about what comes next they say the same, and a difference on the screen is one of the models. The
numbers follow from the seed and from what the user has said so far: the first answer to a prompt is
the same whether it is typed, given by --prompt, or stands in a file of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from forgetless.chat.pair import Speaker
from forgetless.data.prompts.prompts import Prompt, supported
from forgetless.data.selftext import (
    Opening,
    by_inversion,
    chat_openings,
    random_stream,
    stop_tokens,
)
from forgetless.errors import UNSAFE_IN_TEXT, OptionError
from forgetless.model.loading import context_length

# What a tokenizer puts where the bytes of a character are not yet complete.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Manner:
    """How models are asked, and how they answer."""

    temperature: float = 0.7
    max_tokens: int = 512
    seed: int = 0
    system: str | None = None
    raw: bool = False


@dataclass
class Talk:
    """What was asked so far, and what each model said to it."""

    speakers: tuple[Speaker, Speaker]
    tokenizer: Any
    manner: Manner
    asked: list[str] = field(default_factory=list)
    said: dict[str, list[str]] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)  # who was cut at the length, this time

    def answer(self, speaker: Speaker, text: str) -> Iterator[str]:
        """What a speaker says to the next `text`, growing token by token as it is iterated over.

        Raises OptionError where it does not fit into the model's context, or the template refuses
        it.
        """
        opening = self.opening(speaker, text)
        length = min(_room_for(speaker, opening), self.manner.max_tokens)
        return self._growing(speaker, opening, length)

    def _growing(self, speaker: Speaker, opening: Opening, length: int) -> Iterator[str]:
        """The answer so far, again and again until it ends."""
        stops = stop_tokens(speaker.model, self.tokenizer)
        tokens: list[int] = []
        for token in _spoken(speaker, opening, self.manner, length):
            if token in stops:
                return
            tokens.append(token)
            yield as_text(self.tokenizer, tokens).rstrip(INCOMPLETE)
        self.cut.append(speaker.name)

    def opening(self, speaker: Speaker, text: str) -> Opening:
        """What a speaker goes on from: its own conversation, in the chat template, or --raw the
        text alone.
        """
        turns = [{"role": "user", "content": asked} for asked in (*self.asked, text)]
        if self.manner.raw:
            return raw_opening(text, self.tokenizer)
        history: list[Mapping[str, str]] = []
        for turn, said in zip(turns, [*self.said.get(speaker.name, ()), None], strict=True):
            history.append(turn)
            if said is not None:
                history.append({"role": "assistant", "content": said})
        [opening] = chat_openings_of(
            [with_system(Prompt("own", tuple(history)), self.manner.system)], self.tokenizer
        )
        heard = with_system(Prompt("own", tuple(turns)), self.manner.system)
        return Opening(heard.id, opening.kind, opening.ids)

    def keep(self, text: str, said: Mapping[str, str]) -> None:
        """Add a turn to both histories."""
        self.asked.append(text)
        for speaker in self.speakers:
            self.said.setdefault(speaker.name, []).append(said.get(speaker.name, ""))

    def forget(self) -> None:
        """Begin another conversation."""
        self.asked.clear()
        self.said.clear()


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """A prompt with a system turn before it, where it has none of its own."""
    if system is None or any(turn.get("role") == "system" for turn in prompt.messages):
        return prompt
    return replace(prompt, messages=({"role": "system", "content": system}, *prompt.messages))


def chat_openings_of(prompts: Sequence[Prompt], tokenizer: Any) -> list[Opening]:
    """The prompts in the chat template. Raises OptionError for one that it cannot put."""
    _, refused = supported(prompts, tokenizer)
    for reason, which in refused.items():
        raise OptionError(f"{len(which)} of {len(prompts)} prompts cannot be asked: {reason}")
    return chat_openings(prompts, tokenizer)


def raw_opening(text: str, tokenizer: Any) -> Opening:
    """A text that is continued as it stands."""
    prompt = Prompt("own", ({"role": "user", "content": text},))
    return Opening(prompt.id, "own", tuple(tokenizer(text)["input_ids"]))


def as_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text that no terminal obeys."""
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return UNSAFE_IN_TEXT.sub("", text)


def _room_for(speaker: Speaker, opening: Opening) -> int:
    """Tokens that the model's context leaves for an answer. Raises OptionError for none."""
    context = context_length(speaker.model)
    if len(opening.ids) >= context:
        raise OptionError(
            f"the conversation has {len(opening.ids)} tokens, and the model's context {context}; "
            "/new begins another one"
        )
    return context - len(opening.ids)


@torch.no_grad()
def _spoken(speaker: Speaker, opening: Opening, manner: Manner, length: int) -> Iterator[int]:
    """The tokens of one answer, each as soon as it is drawn; `length` at most."""
    draws: np.random.Generator = random_stream(manner.seed, opening.id)
    device = next(speaker.model.parameters()).device
    ids = torch.tensor([opening.ids], device=device)  # (1, tokens)
    cache = DynamicCache()
    for _ in range(length):
        with speaker.speaking() as model:
            logits = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]  # (1, vocabulary)
        token = by_inversion(logits, np.array([draws.random()]), manner.temperature)
        yield int(token)
        ids = token[:, None]
