"""KL divergence between two models' predictions, in nats, over the whole vocabulary.

    KL(base || tuned) = sum over tokens t and the vocabulary v of  p_tv (log p_tv - log q_tv)
    with  p = softmax(base),  q = softmax(tuned)

Its gradient in the tuned logits is q - p, so no graph is needed: `kl_gradient` goes through a few
tokens at a time, in f32, and `kl_reference` is the same through autograd. Memory beyond the logits:
four f32 tensors of (tokens at a time, vocabulary).

    nats, gradient = kl_gradient(tuned.detach(), base)
    tuned.backward(gradient / len(tuned))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgetless.model.weights import wider


def kl_reference(tuned: Tensor, base: Tensor) -> Tensor:
    """KL(base || tuned) in nats, summed over tokens; both are logits (tokens, vocabulary).

    This is the specification; it is differentiable in `tuned`.
    """
    dtype = wider(tuned.dtype)
    log_q = tuned.to(dtype).log_softmax(-1)
    log_p = base.to(dtype).log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


@torch.no_grad()
def kl_gradient(tuned: Tensor, base: Tensor, *, at_a_time: int = 256) -> tuple[float, Tensor]:
    """(KL(base || tuned) in nats, summed over tokens; its gradient in `tuned`, in its dtype).

    Both are logits (tokens, vocabulary).
    """
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
