"""Answers of the base model that an importance file holds, with what the base made of them, so that
`tune` can hold to them without a text and without asking the base.

    kept = keep(base, answers)              # as `record --keep-answers 64` does
    kept.tensors(), kept.about()            # as a file has them
    read_answers(path, tensors, about)      # checked, or a FileError

    answers/ids (tokens,)                   all answers, prompts before them, one after another
    answers/lengths, answers/starts (count,)    of each: its tokens, and where the answer begins
    answers/tokens, answers/log_probs (n, k)    at each place of an answer: the base's likeliest
    answers/rest, answers/said (n,)             tokens, all others together, and what was said

Log-probabilities are in nats and f32, tokens in int32. With k = 64 a token takes half a KiB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.data.selftext import Answer
from forgetless.errors import FileError
from forgetless.evaluate.divergence import StoredBase, stored_base
from forgetless.files.untrusted import JsonObject

PREFIX = "answers/"
WHOLE = ("ids", "lengths", "starts", "tokens")
REAL = ("log_probs", "rest", "said")
# A log-probability may be above 0 by rounding.
ROUNDING = 1e-4
# How far the probabilities at a place may be from 1 together: a thousand of them round less.
NOT_ONE = 1e-2
RECORD_AGAIN = "the file is damaged, record again"


@dataclass(frozen=True)
class KeptAnswers:
    """Answers, and of each what is stored of the base."""

    answers: list[Answer]
    stored: list[StoredBase]

    def __len__(self) -> int:
        return len(self.answers)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file by their names."""
        stored = self.stored
        parts = {
            "ids": torch.tensor([token for answer in self.answers for token in answer.ids]),
            "lengths": torch.tensor([len(answer.ids) for answer in self.answers]),
            "starts": torch.tensor([answer.start for answer in self.answers]),
            "tokens": torch.cat([base.tokens for base in stored]),
            "log_probs": torch.cat([base.log_probs for base in stored]),
            "rest": torch.cat([base.rest for base in stored]),
            "said": torch.cat([base.said for base in stored]),
        }
        kinds = {**dict.fromkeys(WHOLE, torch.int32), **dict.fromkeys(REAL, torch.float32)}
        return {PREFIX + name: part.cpu().to(kinds[name]) for name, part in parts.items()}

    def about(self) -> JsonObject:
        """The rest, for the metadata."""
        return {
            "prompts": [answer.prompt for answer in self.answers],
            "kinds": [answer.kind for answer in self.answers],
            "ended": [answer.ended for answer in self.answers],
        }


def keep(base: nn.Module, answers: Sequence[Answer]) -> KeptAnswers:
    """The answers with what `base` makes of them; those of nothing are left out."""
    said = [answer for answer in answers if answer.scored]
    return KeptAnswers(said, stored_base(base, said))


def read_answers(path: str | Path, tensors: Mapping[str, Tensor], about: object) -> KeptAnswers:
    """What a file holds, by the names without PREFIX. Raises FileError where it cannot be that."""
    about = about if isinstance(about, dict) else {}
    lists: list[list[Any]] = [about.get(name, []) for name in ("prompts", "kinds", "ended")]
    _check_tensors(path, tensors)
    lengths, starts = tensors["lengths"].tolist(), tensors["starts"].tolist()
    if not all(isinstance(each, list) and len(each) == len(lengths) for each in lists):
        raise FileError(f"{path}: the kept answers have no names for each; {RECORD_AGAIN}")
    sizes = [length - start for length, start in zip(lengths, starts, strict=True)]
    rows = [len(tensors[name]) for name in ("tokens", *REAL)]
    fits = all(start >= 1 for start in starts) and all(size >= 1 for size in sizes)
    if not fits or sum(lengths) != len(tensors["ids"]) or set(rows) != {sum(sizes)}:
        raise FileError(
            f"{path}: the kept answers have other lengths than their tokens; {RECORD_AGAIN}"
        )
    rows_of_answers = zip(*lists, tensors["ids"].split(lengths), starts, strict=True)
    answers = [
        Answer(str(prompt), str(kind), tuple(ids.tolist()), start, bool(ended))
        for prompt, kind, ended, ids, start in rows_of_answers
    ]
    each = zip(*(tensors[name].split(sizes) for name in ("tokens", *REAL)), strict=True)
    stored = [
        StoredBase(tokens.long(), log_probs, rest, said, _is_other(tokens, answer))
        for answer, (tokens, log_probs, rest, said) in zip(answers, each, strict=True)
    ]
    return KeptAnswers(answers, stored)


def _is_other(tokens: Tensor, answer: Answer) -> Tensor:
    """Whether what was said is none of the likeliest tokens, (n,)."""
    return ~(tokens == torch.tensor(answer.scored)[:, None]).any(-1)


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Names, shapes, dtypes and values. Raises FileError."""
    expected = {*WHOLE, *REAL}
    if set(tensors) != expected:
        raise FileError(
            f"{path}: the kept answers are made of {', '.join(sorted(tensors))}, expected "
            f"{', '.join(sorted(expected))}; {RECORD_AGAIN}"
        )
    for name, tensor in tensors.items():
        dimensions = 2 if name in ("tokens", "log_probs") else 1
        dtype = torch.int32 if name in WHOLE else torch.float32
        if tensor.ndim != dimensions or tensor.dtype != dtype or not tensor.numel():
            raise FileError(
                f"{path}: answers/{name} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{dimensions} dimensions in {dtype}; {RECORD_AGAIN}"
            )
        plausible = tensor >= 0 if name in WHOLE else (tensor <= ROUNDING) & tensor.isfinite()
        if not bool(plausible.all()):
            raise FileError(f"{path}: answers/{name} holds values that cannot be; {RECORD_AGAIN}")
    if tensors["tokens"].shape != tensors["log_probs"].shape:
        raise FileError(
            f"{path}: answers/tokens and answers/log_probs differ in shape; {RECORD_AGAIN}"
        )
    if len(tensors["rest"]) == len(tensors["log_probs"]):
        together = tensors["log_probs"].exp().sum(1) + tensors["rest"].exp()
        if float((together - 1).abs().max()) > NOT_ONE:
            raise FileError(
                f"{path}: the probabilities of the kept answers do not add up to 1; {RECORD_AGAIN}"
            )
