"""Self text: what a model itself says, sampled from its own distribution and nothing else.

    openings = chat_openings(prompts, tokenizer)        # of a base model: bare_openings
    answers = sample(model, tokenizer, openings, seed=0, length=256)
    answers[0].scored              # token ids of the answer, its end included where it ended

A chat model goes on from prompts (data/prompts/), which its chat template puts to it, a base model
from the token that begins a text. The temperature is 1, without top-k, top-p and penalties. What
generation_config asks for is a manner of decoding, and text from another distribution than the
model's own would make its divergence from itself look like something.

Every opening has its own stream of random numbers, which follows from the seed and its name, so
its answer does not depend on what else is sampled, in which batch, or after which interruption
(to the rounding of a batch's shape). An answer that reaches `length` tokens is kept as it is.

It costs one forward pass of a batch for each token of its longest answer. The batch is made smaller
as answers end: once half of its rows have ended they are taken out of the cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from forgetless.data.documents import Document, TokenDocument
from forgetless.data.prompts.prompts import Prompt, prompt_ids
from forgetless.errors import OptionError, printable
from forgetless.files.room import free_memory
from forgetless.files.untrusted import load_json

logger = logging.getLogger("forgetless")

# Rows of a batch. A step reads all weights once, whatever the rows: on the real model one thread
# made 8, 34 and 81 tokens a second with 1, 8 and 32 rows, in f32.
BATCH_ROWS = {"cpu": 32, "cuda": 64}
# Tokens of each row by which it is measured how long sampling will take.
TIMED_TOKENS = 4


@dataclass(frozen=True)
class Opening:
    """What a model goes on from."""

    id: str  # its random numbers follow from it
    kind: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a model said after one opening."""

    prompt: str  # the opening's id
    kind: str
    ids: tuple[int, ...]  # the opening, then the answer
    start: int  # the place of the answer's first token in `ids`
    ended: bool  # whether the answer ends by itself: its last token is one that ends

    @property
    def scored(self) -> tuple[int, ...]:
        return self.ids[self.start :]


def as_documents(answers: Sequence[Answer]) -> list[Document]:
    """The answers as general text, to record on or to replay: what was said is scored."""
    return [TokenDocument(None, None, answer.kind, answer.ids, answer.start) for answer in answers]


def chat_openings(prompts: Sequence[Prompt], tokenizer: Any) -> list[Opening]:
    """The prompts in the tokenizer's chat template, up to where the assistant would answer."""
    return [
        Opening(prompt.id, prompt.kind, tuple(prompt_ids(prompt, tokenizer))) for prompt in prompts
    ]


def bare_openings(tokenizer: Any, names: Sequence[str]) -> list[Opening]:
    """For a base model: nothing but the token that begins a text, once for each name.

    Raises OptionError where the tokenizer has no such token.
    """
    begin = tokenizer.bos_token_id
    if begin is None:
        begin = tokenizer.eos_token_id
    if begin is None:
        raise OptionError(
            "--general self needs a tokenizer with a begin- or end-of-text token; give a text "
            "file instead"
        )
    return [Opening(name, "self", (begin,)) for name in names]


def sample(
    model: nn.Module,
    tokenizer: Any,
    openings: Sequence[Opening],
    *,
    seed: int,
    length: int,
    temperature: float = 1.0,
    rows: int | None = None,
    stops: frozenset[int] | None = None,
    done: Callable[[list[Answer]], None] | None = None,
) -> list[Answer]:
    """One answer of at most `length` tokens to each opening, in the openings' order.

    Args:
        temperature: 1 for the model's own distribution, which is what self text is of.
        rows: openings in a batch; by default what suits the model's device.
        stops: the tokens that end an answer; by default those of the model.
        done: called with the answers of each batch as it is finished, to keep them.
    """
    device = next(model.parameters()).device
    rows = rows or BATCH_ROWS.get(device.type, BATCH_ROWS["cuda"])
    stops = stop_tokens(model, tokenizer) if stops is None else stops
    # Openings of like length share a batch, so that little is padded.
    order = sorted(range(len(openings)), key=lambda place: (len(openings[place].ids), place))
    answers: dict[int, Answer] = {}
    training = model.training
    asked = _quick(model.eval())
    try:
        for first in range(0, len(order), rows):
            batch = order[first : first + rows]
            draws = [random_stream(seed, openings[place].id) for place in batch]
            given = [list(openings[place].ids) for place in batch]
            said = _answers(asked, given, draws, stops, length, temperature)
            for place, tokens in zip(batch, said, strict=True):
                opening = openings[place]
                answers[place] = Answer(
                    prompt=opening.id,
                    kind=opening.kind,
                    ids=(*opening.ids, *tokens),
                    start=len(opening.ids),
                    ended=_ended(tokens, stops),
                )
            if done is not None:
                done([answers[place] for place in batch])
    finally:
        model.train(training)
    return [answers[place] for place in range(len(openings))]


def seconds_to_sample(model: nn.Module, count: int, length: int) -> float:
    """About how long `count` answers of `length` tokens take, by the time of a few tokens now.

    The time that reading the openings takes, and that answers end before that, is left out.
    """
    device = next(model.parameters()).device
    rows = min(count, BATCH_ROWS.get(device.type, BATCH_ROWS["cuda"]))
    asked = _quick(model.eval())
    seconds = []
    for tokens in (1, TIMED_TOKENS + 1):
        draws = [np.random.default_rng(row) for row in range(rows)]
        started = time.perf_counter()
        _answers(asked, [[0]] * rows, draws, frozenset(), tokens, 1.0)
        seconds.append(time.perf_counter() - started)
    each = max(0.0, seconds[1] - seconds[0]) / TIMED_TOKENS
    return -(-count // rows) * length * each


def _quick(model: nn.Module) -> nn.Module:
    """The model, or on a CPU its copy in f32 where it is stored in 16 bit and memory allows.

    With few rows 16 bit is slow there: on the real model a token of 32 rows took 1.26 s in bf16 and
    0.37 s in f32. What is sampled differs by rounding.
    """
    parameters = list(model.parameters())
    halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters)
    if parameters[0].device.type != "cpu" or not halves:
        return model
    needed = 4 * sum(p.numel() for p in parameters)
    return copy.deepcopy(model).float() if 2 * needed < (free_memory() or 0) else model


def stop_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's makers name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = named if isinstance(named, (list, tuple)) else [named]
    ends = [*several, tokenizer.eos_token_id]
    return frozenset(int(token) for token in ends if token is not None)


def random_stream(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one opening."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@torch.no_grad()
def _answers(
    model: nn.Module,
    openings: list[list[int]],
    draws: list[np.random.Generator],
    stops: frozenset[int],
    length: int,
    temperature: float,
) -> list[list[int]]:
    """Answers to one batch of openings, token by token."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids in openings)
    # Padded on the left, so that every row's next token is predicted at the last place.
    ids = torch.tensor([[0] * (width - len(row)) + row for row in openings], device=device)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in openings], device=device
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    answers: list[list[int]] = [[] for _ in openings]
    alive = list(range(len(openings)))  # which opening each row of the batch answers
    for _ in range(length):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        uniform = np.array([draws[row].random() for row in alive])
        tokens = by_inversion(logits, uniform, temperature)
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


def by_inversion(logits: Tensor, uniform: np.ndarray, temperature: float = 1.0) -> Tensor:
    """One token a row from the softmax of `logits` (rows, vocabulary), by inversion.

    At temperature 0 it is the likeliest token, whatever the random number.

    The sums are in f64: in f32 the last tokens of a large vocabulary would be drawn too often or
    never.
    """
    if temperature == 0:
        return logits.argmax(-1)
    below = (logits.double() / temperature).softmax(-1).cumsum(-1)
    wanted = torch.from_numpy(uniform).to(below.device)[:, None] * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]


def write_lines(answers: Iterable[Answer]) -> str:
    """Answers as JSON lines."""
    return "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)


def read_lines(path: Path) -> list[Answer]:
    """The whole lines of a file of answers.

    A last line that was cut off is left out, and so is one that holds no answer, as where somebody
    has changed the file: it is sampled again, with the same random numbers.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    answers = [answer for answer in map(_answer_in, lines) if answer is not None]
    if len(answers) < len(lines):
        logger.warning(
            "%s: %d of %d lines hold no answer, and are left out",
            printable(path),
            len(lines) - len(answers),
            len(lines),
        )
    return answers


def _answer_in(line: bytes) -> Answer | None:
    """The answer in a line; None where it holds none."""
    try:
        row = load_json(line.decode())
    except ValueError:
        return None
    if not isinstance(row, dict) or set(row) != {field.name for field in fields(Answer)}:
        return None
    ids, start = row["ids"], row["start"]
    if not isinstance(ids, list) or not all(map(_is_place, [start, *ids])):
        return None
    named = isinstance(row["prompt"], str) and isinstance(row["kind"], str)
    if not named or not isinstance(row["ended"], bool) or not 0 < start <= len(ids):
        return None
    return Answer(**{**row, "ids": tuple(ids)})


def _is_place(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
