"""Divergence: how far a tuned model is from its base, on what the base itself would say.

At every scored position of the base's own answers

    KL(base || tuned) = sum_v p(v) (log p(v) - log q(v))          nats

is computed over the whole vocabulary; its mean over tokens is forgetting in nats per token. It is
zero only where nothing changed, it never falls below zero, and its curvature at the base is the
true Fisher information of that text: half the energy of importance recorded there predicts it.

    base = reference(model, answers)                 # the base's log-probabilities, once
    sums, tokens = divergence(model, answers, base)  # each (answers,)

Where the base is not at hand, or is not to be run again, `StoredBase` keeps its k likeliest tokens
at each position and the probability of all others together:

    KL >= sum_top p (log p - log q) + r (log r - log s)           r, s: the rest of base and tuned

which is exact where k is the vocabulary, and below the exact one by what happens within the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from forgetless.data.encoding import collate
from forgetless.data.selftext import Answer
from forgetless.evaluate.losses import evaluating

# Tokens of a batch of answers: a block of logits in f32 stays within 400 MB at 100,000 words.
ANSWER_TOKENS = 1024
# A rest below this is not told from nothing: so much is what the normalisation in f32 leaves. With
# a smaller floor a full vocabulary's rest of 3e-7 against nothing looked like 2e-5 nats.
SMALLEST = 1e-6


@dataclass(frozen=True)
class StoredBase:
    """The base at the scored positions of one answer of n tokens."""

    tokens: Tensor  # (n, k) the likeliest tokens
    log_probs: Tensor  # (n, k) their log-probabilities, in nats
    rest: Tensor  # (n,) the probability of all other tokens together


def kl(base: Tensor, tuned: Tensor) -> Tensor:
    """Exact divergence at each position, (n,), from logits (n, vocabulary) of any dtype."""
    return _summed(base.float().log_softmax(-1), tuned.float().log_softmax(-1)).sum(-1)


def _summed(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) + q - p of each token, in f32.

    What is added sums to nothing. It makes every term as small as the divergence is, so that the
    rounding of the two normalisations cancels: without it a divergence of 0.004 nats was off by a
    thousandth of itself.
    """
    p, q = log_p.exp(), log_q.exp()
    return p * (log_p - log_q) + (q - p)


def stored_kl(base: StoredBase, tuned: Tensor) -> Tensor:
    """The divergence that the stored part shows at each position, (n,)."""
    log_q = tuned.float().log_softmax(-1).gather(-1, base.tokens)
    top = _summed(base.log_probs.float(), log_q).sum(-1)
    rest_q = (1 - log_q.double().exp().sum(-1)).clamp(min=SMALLEST).float()
    rest_p = base.rest.float().clamp(min=SMALLEST)
    return top + _summed(rest_p.log(), rest_q.log())


def store(base: Tensor, k: int) -> StoredBase:
    """The stored form of the base's logits (n, vocabulary)."""
    log_probs = base.float().log_softmax(-1)
    top = log_probs.topk(min(k, base.shape[-1]), -1)
    rest = (1 - top.values.double().exp().sum(-1)).clamp(min=0).float()
    return StoredBase(top.indices, top.values, rest)


def answer_logits(model: nn.Module, answers: Sequence[Answer]) -> list[Tensor]:
    """The logits that predict the tokens of each answer of a batch: (tokens, vocabulary) each."""
    device = next(model.parameters()).device
    batch = collate([(list(answer.ids), [True] * len(answer.ids)) for answer in answers], pad_id=0)
    # Only from the first answer's beginning on: prompts are not scored.
    first = min(answer.start for answer in answers) - 1
    with evaluating(model):
        logits = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            logits_to_keep=batch["input_ids"].shape[1] - first,
        ).logits
    return [
        logits[row, answer.start - 1 - first : len(answer.ids) - 1 - first]
        for row, answer in enumerate(answers)
    ]


def answer_batches(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    """The answers in their order, as many at a time as one forward pass takes."""
    batch: list[Answer] = []
    for answer in answers:
        width = max(len(each.ids) for each in [*batch, answer])
        if batch and width * (len(batch) + 1) > ANSWER_TOKENS:
            yield batch
            batch = []
        batch.append(answer)
    if batch:
        yield batch


def divergence(
    base: nn.Module | Sequence[StoredBase], tuned: nn.Module, answers: Sequence[Answer]
) -> tuple[np.ndarray, np.ndarray]:
    """(nats of divergence, tokens) of each answer, both (answers,); by a base model exactly."""
    sums: list[float] = []
    for batch in answer_batches(answers):
        after = answer_logits(tuned, batch)
        if isinstance(base, nn.Module):
            each = map(kl, answer_logits(base, batch), after)
        else:
            each = map(stored_kl, base[len(sums) : len(sums) + len(batch)], after)
        sums += [float(nats.double().sum()) for nats in each]
    return np.array(sums), np.array([len(answer.scored) for answer in answers], float)
