"""What the domain's rows are learned by where that is not their cross-entropy: `eaft`, `dft` and
`masked-kl`. None of them needs data beside the domain's.

With q the model's probabilities, p the base's, and y the token that stands in the row, each scored
token adds

    eaft         -w log q(y),   w = entropy of the 20 likeliest tokens, renormalised, over log 20
                 (arXiv 2601.02151): a model that is sure of another token learns little there
    dft          -w log q(y),   w = q(y)   (arXiv 2508.05629): what is unlikely is learned little
    masked-kl    -log q(y) + weight * KL(p' || q')   where p' and q' are p and q without y,
                 renormalised (arXiv 2605.29498): the others keep their proportions

and w is a number: nothing is learned through it. All are weak at what no token of the base's
predictions foretells, such as new facts (docs/methods-rivals.md).

The gradient in the logits is w (q - e_y), and that of the divergence q' - p' with nothing at y, so
that no graph over the vocabulary is needed: `summed` goes through a few tokens at a time. Its slow
twin, through autograd and token by token, is `reference_loss`.

    losses = summed(logits, targets, None, eaft_rows)     # of (tokens, vocabulary) and (tokens,)
    losses.nats.backward()
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.methods.divergence import rows_at_a_time
from forgetless.methods.method import Setup
from forgetless.model.weights import wider

# Likeliest tokens whose entropy weighs a token; the paper's code takes as many, and divides by 3.0
# where log 20 is 2.996.
LIKELIEST = 20


@dataclass(frozen=True)
class OfRows:
    """What an objective makes of a few tokens: their losses in nats (tokens,), their gradient in
    the logits (tokens, vocabulary), and how much each token's cross-entropy counts, (tokens,).
    """

    nats: Tensor
    gradient: Tensor
    weights: Tensor


# Of log q (tokens, vocabulary), the tokens that are there (tokens,) and log p of the base, or None.
RowsOf = Callable[[Tensor, Tensor, Tensor | None], OfRows]


@dataclass(frozen=True)
class Objective:
    """What the domain's rows are learned by: a formula, and whether it asks for the base's logits
    of the same tokens.
    """

    rows: RowsOf
    from_base: bool = False


@dataclass(frozen=True)
class Summed:
    """An objective over some tokens.

    `nats` is the sum of the losses, differentiable in the logits; `weights` how much each token's
    cross-entropy counted and `cross_entropy` its sum, for the log.
    """

    nats: Tensor
    cross_entropy: float
    weights: Tensor


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient in the logits has been computed already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, nats: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return nats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def summed(logits: Tensor, targets: Tensor, base: Tensor | None, rows_of: RowsOf) -> Summed:
    """The objective over all tokens; logits and base (tokens, vocabulary), targets (tokens,).

    It takes a tensor of the logits' size and dtype beside them, and a few rows in f32 or wider.
    """
    gradient = torch.empty_like(logits)
    dtype = wider(logits.dtype)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    weights = torch.empty(len(targets), dtype=dtype, device=logits.device)
    cross_entropy = 0.0
    at_a_time = rows_at_a_time(logits)
    with torch.no_grad():
        for start in range(0, len(targets), at_a_time):
            rows = slice(start, start + at_a_time)
            log_q = logits[rows].to(dtype).log_softmax(-1)
            log_p = None if base is None else base[rows].to(dtype).log_softmax(-1)
            made = rows_of(log_q, targets[rows], log_p)
            total += made.nats.sum()
            weights[rows] = made.weights
            gradient[rows] = made.gradient.to(gradient.dtype)
            cross_entropy -= float(_of_targets(log_q, targets[rows]).sum())
    nats: Tensor = _KnownGradient.apply(logits, total, gradient)  # type: ignore[no-untyped-call]
    return Summed(nats, cross_entropy, weights)


def _of_targets(values: Tensor, targets: Tensor) -> Tensor:
    """The value of each token that is there, (tokens,)."""
    return values.gather(-1, targets[:, None])[:, 0]


def _weighted_rows(log_q: Tensor, targets: Tensor, weights: Tensor) -> OfRows:
    """-w log q(y), whose gradient is w (q - e_y)."""
    gradient = log_q.exp()
    gradient.scatter_add_(-1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    gradient.mul_(weights[:, None])
    return OfRows(-weights * _of_targets(log_q, targets), gradient, weights)


def eaft_rows(log_q: Tensor, targets: Tensor, log_p: Tensor | None = None) -> OfRows:
    """Cross-entropy weighted by the entropy of the likeliest tokens, between 0 and 1."""
    likeliest = min(LIKELIEST, log_q.shape[-1])
    top = log_q.topk(likeliest, -1).values.log_softmax(-1)
    entropy = -(top.exp() * top).sum(-1)
    return _weighted_rows(log_q, targets, entropy / math.log(likeliest))


def dft_rows(log_q: Tensor, targets: Tensor, log_p: Tensor | None = None) -> OfRows:
    """Cross-entropy weighted by the probability of the token that is there."""
    return _weighted_rows(log_q, targets, _of_targets(log_q, targets).exp())


def masked_kl_rows(
    log_q: Tensor, targets: Tensor, log_p: Tensor | None, *, weight: float
) -> OfRows:
    """Cross-entropy, and `weight` times the divergence of the other tokens from the base's."""
    assert log_p is not None
    made = _weighted_rows(log_q, targets, torch.ones_like(log_q[:, 0]))
    there = targets[:, None]
    # The token that is there is out of both: its difference counts nothing.
    log_other_p = log_p.scatter(-1, there, -torch.inf).log_softmax(-1)
    log_other_q = log_q.scatter(-1, there, -torch.inf).log_softmax(-1)
    p, q = log_other_p.exp(), log_other_q.exp()
    difference = (log_other_p - log_other_q).scatter(-1, there, 0.0)
    nats = made.nats + weight * (p * difference).sum(-1)
    return OfRows(nats, made.gradient.add_(q.sub_(p), alpha=weight), made.weights)


def reference_loss(
    name: str, logits: Tensor, targets: Tensor, base: Tensor | None = None, weight: float = 1.0
) -> Tensor:
    """What the method `name` minimises over the tokens, summed, through autograd, token by token.

    It is the specification: logits and base (tokens, vocabulary), targets (tokens,).
    """
    total = logits.new_zeros(())
    for at, there in enumerate(targets.tolist()):
        q = logits[at].softmax(-1)
        loss = -q[there].log()
        if name == "eaft":
            top = q.detach().sort(descending=True).values[:LIKELIEST]
            top = top / top.sum()
            total = total + loss * (-(top * top.log()).sum() / math.log(len(top)))
        elif name == "dft":
            total = total + loss * q[there].detach()
        else:
            assert name == "masked-kl" and base is not None
            others = [token for token in range(len(q)) if token != there]
            p = base[at].softmax(-1)[others]
            p, q = p / p.sum(), q[others] / q[others].sum()
            total = total + loss + weight * (p * (p / q).log()).sum()
    return total


def eaft(setup: Setup, model: nn.Module) -> Objective:
    """Entropy-adaptive fine-tuning."""
    return Objective(eaft_rows)


def dft(setup: Setup, model: nn.Module) -> Objective:
    """Dynamic fine-tuning."""
    return Objective(dft_rows)


def masked_kl(setup: Setup, model: nn.Module) -> Objective | None:
    """Cross-entropy and the divergence of the other tokens; None where its weight is 0."""
    weight = setup.options.masked_weight
    assert weight is not None
    if weight == 0:
        return None
    return Objective(functools.partial(masked_kl_rows, weight=weight), from_base=True)
