"""Self text: what a model itself says, sampled from its own distribution and nothing else.

    answers = sample(model, tokenizer, prompts, seed=0, length=256)
    answers[0].scored              # token ids of the answer, its end included where it ended

For a chat model this is what it answers to prompts (data/prompts/), which its chat template puts
to it. The temperature is 1, without top-k, top-p and penalties. What generation_config asks for is
a manner of decoding, and text from another distribution than the model's own would make its
divergence from itself look like something.

Every prompt has its own stream of random numbers, which follows from the seed and the prompt, so
its answer does not depend on what else is sampled, in which batch, or after which interruption
(to the rounding of a batch's shape). An answer that reaches `length` tokens is kept as it is.

It costs one forward pass of a batch for each token of its longest answer. The batch is made smaller
as answers end: once half of its rows have ended they are taken out of the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from forgetless.data.prompts.prompts import Prompt, prompt_ids

# Rows of a batch. On a CPU more rows leave its caches; on a GPU one token of a row costs nothing.
BATCH_ROWS = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    prompt: str  # the prompt's id
    kind: str
    ids: tuple[int, ...]  # the templated prompt, then the answer
    start: int  # the place of the answer's first token in `ids`
    ended: bool  # whether the answer ends by itself: its last token is one that ends

    @property
    def scored(self) -> tuple[int, ...]:
        return self.ids[self.start :]


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    length: int,
    rows: int | None = None,
    done: Callable[[list[Answer]], None] | None = None,
) -> list[Answer]:
    """One answer of at most `length` tokens to each prompt, in the prompts' order.

    Args:
        rows: prompts in a batch; by default what suits the model's device.
        done: called with the answers of each batch as it is finished, to keep them.
    """
    device = next(model.parameters()).device
    rows = rows or BATCH_ROWS.get(device.type, BATCH_ROWS["cuda"])
    stops = stop_tokens(model, tokenizer)
    encoded = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda place: (len(encoded[place]), place))
    answers: dict[int, Answer] = {}
    training = model.training
    model.eval()
    try:
        for first in range(0, len(order), rows):
            batch = order[first : first + rows]
            draws = [_stream(seed, prompts[place].id) for place in batch]
            said = _answers(model, [encoded[place] for place in batch], draws, stops, length)
            for place, tokens in zip(batch, said, strict=True):
                answers[place] = Answer(
                    prompt=prompts[place].id,
                    kind=prompts[place].kind,
                    ids=(*encoded[place], *tokens),
                    start=len(encoded[place]),
                    ended=bool(tokens) and tokens[-1] in stops,
                )
            if done is not None:
                done([answers[place] for place in batch])
    finally:
        model.train(training)
    return [answers[place] for place in range(len(prompts))]


def stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's makers name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    ends = [*several, tokenizer.eos_token_id]
    return frozenset(int(token) for token in ends if token is not None)


def _stream(seed: int, prompt: str) -> np.random.Generator:
    """The random numbers of one prompt."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@torch.no_grad()
def _answers(
    model: nn.Module,
    prompts: list[list[int]],
    draws: list[np.random.Generator],
    stops: frozenset[int],
    length: int,
) -> list[list[int]]:
    """Answers to one batch of prompts, token by token."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids in prompts)
    # Padded on the left, so that every row's next token is predicted at the last place.
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # which prompt each row of the batch answers
    for _ in range(length):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = _by_inversion(logits, np.array([draws[row].random() for row in alive]))
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if not _ended(answers[row], stops):
                answers[row].append(token)
        going = [place for place, row in enumerate(alive) if not _ended(answers[row], stops)]
        if not going:
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        if len(going) <= len(alive) / 2:
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            alive = [alive[place] for place in going]
    return answers


def _ended(answer: Sequence[int], stops: frozenset[int]) -> bool:
    return bool(answer) and answer[-1] in stops


def _by_inversion(logits: Tensor, uniform: np.ndarray) -> Tensor:
    """One token a row from the softmax of `logits` (rows, vocabulary), by inversion.

    The sums are in f64: in f32 the last tokens of a large vocabulary would be drawn too often or
    never.
    """
    below = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.from_numpy(uniform).to(below.device)[:, None] * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]


def write_lines(answers: Iterable[Answer]) -> str:
    """Answers as JSON lines."""
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)


def read_lines(path: Path) -> list[Answer]:
    """The whole lines of a file of answers; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    answers = []
    for line in lines:
        row = json.loads(line)
        answers.append(Answer(**{**row, "ids": tuple(row["ids"])}))
    return answers
