"""KL divergence between two models' predictions, in nats, over the whole vocabulary, and its
gradient without a graph.

    KL(base || tuned) = sum over tokens t and the vocabulary v of  p_tv (log p_tv - log q_tv)
    with  p = softmax(base),  q = softmax(tuned)

Its gradient in the tuned logits is q - p, so no graph is needed: `kl_gradient` goes through a few
tokens at a time, in f32, and `kl_reference` is the same through autograd. Memory beyond the logits:
four f32 tensors of (tokens at a time, vocabulary).

Where of the base the k likeliest tokens are stored, the probability r of the others and that of the
token that was said (evaluate/divergence.py), the gradient is, with s = the part of q that
the others have,

    q - p                             of a stored token
    q (1 - (r - o) / s) - o [said]    of another one; o = 1 where the said token is one, else 0

`stored_gradient` makes it from one softmax; `evaluate.divergence.stored_kl` through autograd is its
slow twin, which took five times the memory of the logits.

    nats, gradient = kl_gradient(tuned.detach(), base)
    tuned.backward(gradient / len(tuned))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgetless.evaluate.divergence import NOTHING, StoredBase
from forgetless.model.weights import wider

# Logits that a gradient is made of at a time: 8 MiB in f32, which caches hold and allocators keep.
LOGITS_AT_A_TIME = 2**21


def kl_reference(tuned: Tensor, base: Tensor) -> Tensor:
    """KL(base || tuned) in nats, summed over tokens; both are logits (tokens, vocabulary).

    This is the specification; it is differentiable in `tuned`.
    """
    dtype = wider(tuned.dtype)
    log_q = tuned.to(dtype).log_softmax(-1)
    log_p = base.to(dtype).log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


@torch.no_grad()
def kl_gradient(
    tuned: Tensor, base: Tensor, *, at_a_time: int | None = None
) -> tuple[float, Tensor]:
    """(KL(base || tuned) in nats, summed over tokens; its gradient in `tuned`, in its dtype).

    Both are logits (tokens, vocabulary).
    """
    at_a_time = at_a_time or rows_at_a_time(tuned)
    gradient = torch.empty_like(tuned)
    nats = 0.0
    dtype = wider(tuned.dtype)
    for start in range(0, len(tuned), at_a_time):
        rows = slice(start, start + at_a_time)
        log_q = tuned[rows].to(dtype).log_softmax(-1)  # (rows, vocabulary)
        log_p = base[rows].to(dtype).log_softmax(-1)
        p = log_p.exp()
        nats += float((p * (log_p - log_q)).sum())
        gradient[rows] = log_q.exp_().sub_(p).to(gradient.dtype)
    return nats, gradient


def rows_at_a_time(logits: Tensor) -> int:
    """How many rows of (tokens, vocabulary) a gradient is made of at a time."""
    return max(1, LOGITS_AT_A_TIME // logits.shape[-1])


@torch.no_grad()
def stored_gradient(
    tuned: Tensor, base: StoredBase, said: Tensor, *, at_a_time: int | None = None
) -> tuple[float, Tensor]:
    """(The divergence by what is stored in nats, summed over tokens; its gradient in `tuned`).

    `tuned` are logits (tokens, vocabulary), `said` the tokens (tokens,) that were.
    """
    at_a_time = at_a_time or rows_at_a_time(tuned)
    gradient = torch.empty_like(tuned)
    nats = 0.0
    for start in range(0, len(tuned), at_a_time):
        rows = slice(start, start + at_a_time)
        part = StoredBase(
            base.tokens[rows],
            base.log_probs[rows],
            base.rest[rows],
            base.said[rows],
            base.other[rows],
        )
        each, of_rows = _stored_gradient(tuned[rows].to(wider(tuned.dtype)), part, said[rows])
        nats += float(each.sum())
        gradient[rows] = of_rows.to(gradient.dtype)
    return nats, gradient


def _stored_gradient(tuned: Tensor, base: StoredBase, said: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each of a few tokens, and its gradient in their logits."""
    log_sum = tuned.logsumexp(-1, keepdim=True)
    q = (tuned - log_sum).exp_()  # (tokens, vocabulary); it becomes the gradient
    said = said[:, None]
    log_said = tuned.gather(-1, said) - log_sum
    log_top = tuned.gather(-1, base.tokens) - log_sum  # (tokens, k)
    q_top, p_top = log_top.exp(), base.log_probs.exp()
    # The others are summed without the stored ones: what is left of 1 would be rounding.
    q.scatter_(-1, base.tokens, 0.0)
    log_rest = q.sum(-1, keepdim=True).log().clamp(min=NOTHING)
    rest, p_rest = log_rest.exp(), base.rest[:, None].exp()
    other = base.other[:, None].to(q.dtype)
    nats = (p_top * (base.log_probs - log_top) + (q_top - p_top)).sum(-1, keepdim=True)
    nats += p_rest * (base.rest[:, None] - log_rest) + (rest - p_rest)
    nats += other * ((base.said - base.rest)[:, None] - (log_said - log_rest))
    q.mul_(1 - (p_rest - other) / rest)
    q.scatter_(-1, base.tokens, q_top - p_top)
    q.scatter_add_(-1, said, -other)
    return nats[:, 0], q
