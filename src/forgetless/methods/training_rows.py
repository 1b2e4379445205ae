"""Methods that change what is trained on, once, before training; then all is as ever.

    stm              tokens that the base finds unlikely are not learned: those of a perplexity,
                     1 / p(y), above --stm-perplexity, 2.5 as in the paper (arXiv 2501.14315)
    self-dialogues   what the base says itself (--replay chat) stands among the domain's rows
                     (SA-SFT, arXiv 2602.20162)

stm costs one forward pass over the domain's rows, and then what plain tuning costs. A row of which
nothing is left to learn is left out. With self-dialogues an epoch has more steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.data.encoding import Encoded, collate
from forgetless.methods.divergence import rows_at_a_time
from forgetless.methods.method import Setup
from forgetless.methods.terms import scored_logits, undisturbed
from forgetless.model.weights import wider

logger = logging.getLogger("forgetless")


def stm(setup: Setup, model: nn.Module, rows: Any) -> Any:
    """The rows without the labels of tokens that the base finds unlikely.

    Raises ValueError where no token is left.
    """
    from datasets import Dataset

    o = setup.options
    assert o.stm_perplexity is not None
    pieces = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in rows]
    kept = []
    scored = left = 0
    for start in range(0, len(pieces), o.batch_size):
        some = pieces[start : start + o.batch_size]
        nats = token_losses(model, some, pad_id=setup.tokenizer.pad_token_id)
        for (ids, was), losses in zip(some, nats, strict=True):
            labels = _likely_labels(ids, was, losses, math.log(o.stm_perplexity))
            scored += len(losses)
            left += sum(label != -100 for label in labels[1:])
            if any(label != -100 for label in labels[1:]):
                kept.append({"input_ids": ids, "labels": labels})
    if not kept:
        raise ValueError(
            f"--method stm: the base finds each of {scored} tokens more perplexing than "
            f"{o.stm_perplexity:g}, so nothing is left to learn; give a larger --stm-perplexity"
        )
    logger.info(
        "stm: %d of %d tokens, in %d of %d rows, are learned", left, scored, len(kept), len(pieces)
    )
    return Dataset.from_list(kept)


def _likely_labels(
    ids: Sequence[int], scored: Sequence[bool], losses: Sequence[float], most: float
) -> list[int]:
    """The labels of a row whose predicted tokens have these losses in nats, up to the most."""
    each = iter(losses)
    labels = [-100]
    for token, counts in zip(ids[1:], scored[1:], strict=True):
        labels.append(token if counts and next(each) <= most else -100)
    return labels


@torch.no_grad()
def token_losses(
    model: nn.Module, pieces: Sequence[Encoded], *, pad_id: int = 0
) -> list[list[float]]:
    """The cross-entropy in nats of each predicted token of a few sequences."""
    batch = collate(pieces, pad_id)
    with undisturbed(model):
        logits = scored_logits(model, batch)
    targets = batch["labels"][:, 1:]
    targets = targets[targets != -100].to(logits.device)
    losses: list[Tensor] = []
    at_a_time = rows_at_a_time(logits)
    for start in range(0, len(targets), at_a_time):
        some = slice(start, start + at_a_time)
        wide = logits[some].to(wider(logits.dtype))
        losses.append(nn.functional.cross_entropy(wide, targets[some], reduction="none"))
    each = iter(torch.cat(losses).tolist() if losses else [])
    return [[next(each) for counts in scored[1:] if counts] for _, scored in pieces]


def self_dialogues(setup: Setup, model: nn.Module, rows: Any) -> Any:
    """The rows, and after them what --replay has; the trainer mixes them."""
    from datasets import Dataset

    own = [
        {
            "input_ids": ids,
            "labels": [
                token if counts else -100 for token, counts in zip(ids, scored, strict=True)
            ],
        }
        for ids, scored in setup.text
    ]
    logger.info("self-dialogues: %d rows beside %d of the domain", len(own), len(rows))
    return Dataset.from_list([*rows, *own])
