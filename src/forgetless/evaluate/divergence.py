"""Divergence: how far a tuned model is from its base, on what the base itself would say.

At every scored position of the base's own answers

    KL(base || tuned) = sum_v p(v) (log p(v) - log q(v))          nats

is computed over the whole vocabulary; its mean over tokens is forgetting in nats per token. It is
zero only where nothing changed, it never falls below zero, and its curvature at the base is the
true Fisher information of that text: half the energy of importance recorded there predicts it.

    sums, tokens = divergence(base, tuned, answers)       # each (answers,)
    kept = stored_base(base, answers)                     # the base's log-probabilities, once
    sums, tokens = divergence(kept, tuned, answers)

Where the base is not at hand, or is not to be run again, `StoredBase` keeps of each position its k
likeliest tokens, the probability r of all others together, and that of the token that was said.
With s the tuned model's probability of the others,

    KL ~ sum_top p (log p - log q) + r (log r - log s)
         + (log p(said) / r - log q(said) / s    where the said token is one of the others)

The first line is below the exact value by what happens among the others: on the real model, whose
answers are sampled at temperature 1, 64 tokens left 13 % of it out. The second line is what was
left out, in expectation over what is said, so that the mean is right; its noise is counted in the
interval, which is taken over answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from forgetless.data.encoding import collate
from forgetless.data.selftext import Answer
from forgetless.evaluate.losses import evaluating
from forgetless.model.adapters import bare
from forgetless.model.head import logits_at

# Tokens of a batch of answers: a block of logits in f32 stays within 400 MB at 100,000 words.
ANSWER_TOKENS = 1024
# Tokens whose probability is stored at each place. On the real model the others had together 13 %
# of the probability; with 1,024 tokens they would have 3 %, at 16 times the memory.
TOP = 64
# The log-probability of no other token at all: it adds nothing to any sum in f32.
NOTHING = -50.0


@dataclass(frozen=True)
class StoredBase:
    """The base at the scored positions of one answer of n tokens."""

    tokens: Tensor  # (n, k) the likeliest tokens
    log_probs: Tensor  # (n, k) their log-probabilities, in nats
    rest: Tensor  # (n,) the log-probability of all other tokens together
    said: Tensor  # (n,) the log-probability of the token that was said
    other: Tensor  # (n,) whether that is one of the others


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


def stored_kl(base: StoredBase, tuned: Tensor, said: Tensor) -> Tensor:
    """The divergence by what is stored, (n,), where the tokens `said` (n,) were; see the module."""
    log_q = tuned.float().log_softmax(-1)
    top = _summed(base.log_probs.float(), log_q.gather(-1, base.tokens)).sum(-1)
    rest = _others(log_q, base.tokens)
    among = (base.said - base.rest) - (log_q.gather(-1, said[:, None])[:, 0] - rest)
    return top + _summed(base.rest, rest) + torch.where(base.other, among, 0.0)


def _others(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of all tokens but `tokens` (n, k) together, (n,)."""
    others = log_probs.scatter(-1, tokens, -torch.inf)
    return others.logsumexp(-1).clamp(min=NOTHING)


def store(base: Tensor, said: Tensor, k: int = TOP) -> StoredBase:
    """The stored form of the base's logits (n, vocabulary), where the tokens `said` (n,) were."""
    log_probs = base.float().log_softmax(-1)
    top = log_probs.topk(min(k, base.shape[-1]), -1)
    rest = _others(log_probs, top.indices)
    of_said = log_probs.gather(-1, said[:, None])[:, 0]
    other = ~(top.indices == said[:, None]).any(-1)
    return StoredBase(top.indices, top.values, rest, of_said, other)


def answer_logits(model: nn.Module, answers: Sequence[Answer]) -> list[Tensor]:
    """The logits that predict the tokens of each answer of a batch: (tokens, vocabulary) each."""
    device = next(model.parameters()).device
    batch = collate([(list(answer.ids), [True] * len(answer.ids)) for answer in answers], pad_id=0)
    # Prompts are not scored, so that they need no head.
    places = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, answer in enumerate(answers):
        places[row, answer.start - 1 : len(answer.ids) - 1] = True
    with evaluating(model):
        logits = logits_at(
            model,
            places.to(device),
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            use_cache=False,
        )
    return list(logits.split([len(answer.scored) for answer in answers]))


def answer_batches(answers: Sequence[Answer]) -> Iterator[list[int]]:
    """Places of answers of like length, as many at a time as one forward pass takes."""
    batch: list[int] = []
    for place in sorted(range(len(answers)), key=lambda place: len(answers[place].ids)):
        width = len(answers[place].ids)  # none before it is longer
        if batch and width * (len(batch) + 1) > ANSWER_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def divergence(
    base: nn.Module | Sequence[StoredBase] | None, tuned: nn.Module, answers: Sequence[Answer]
) -> tuple[np.ndarray, np.ndarray]:
    """(nats of divergence, tokens) of each answer, both (answers,).

    `base` is a model, by which it is exact; or what was stored of one; or None where it is the
    model under the adapter of `tuned`.
    """
    sums = np.zeros(len(answers))
    for places in answer_batches(answers):
        batch = [answers[place] for place in places]
        after = answer_logits(tuned, batch)
        if base is None:
            with bare(tuned) as under:
                each = list(map(kl, answer_logits(under, batch), after))
        elif isinstance(base, nn.Module):
            each = list(map(kl, answer_logits(base, batch), after))
        else:
            kept = [base[place] for place in places]
            each = list(map(stored_kl, kept, after, _said(batch, after)))
        sums[places] = [float(nats.double().sum()) for nats in each]
    return sums, np.array([len(answer.scored) for answer in answers], float)


def stored_base(model: nn.Module, answers: Sequence[Answer], k: int = TOP) -> list[StoredBase]:
    """What is to be kept of a base, to measure without it later."""
    kept: dict[int, StoredBase] = {}
    for places in answer_batches(answers):
        batch = [answers[place] for place in places]
        logits = answer_logits(model, batch)
        stored = [store(*each, k) for each in zip(logits, _said(batch, logits), strict=True)]
        kept.update(zip(places, stored, strict=True))
    return [kept[place] for place in range(len(answers))]


def _said(answers: Sequence[Answer], beside: Sequence[Tensor]) -> list[Tensor]:
    """The tokens of each answer, on the device of what stands beside it."""
    each = zip(answers, beside, strict=True)
    return [torch.tensor(answer.scored, device=logits.device) for answer, logits in each]
