"""The gradient of the general loss at the base model, as products of thin factors.

Two passes through adapters with U = 0: first with a random A, which gives the range of the gradient
by that of B; then with this range as B, which gives the rest by the gradient of A (a randomised
range finder, Halko et al. 2011, arXiv 0909.4061). There is no (out, in) tensor, and a quantised
base will do.

    factors = gradient(base, "all-linear", batches, rank=32)   # weight -> L (out, k), R (k, in)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forgetless.model import distributed
from forgetless.model.adapters import add_adapter, without_adapter
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight
from forgetless.record.steps import Batch, backward, scored_tokens
from forgetless.report.terminal import progress


def gradient(
    base: nn.Module, names: str, pieces: Sequence[Batch], *, rank: int, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight -> (L (out, k), R (k, in)), bf16: about dL/dW of the loss in nats per token on padded
    batches, by a randomised range of at most `rank` directions.

    `base` is bare before and afterwards.
    """
    model = add_adapter(base, names=names, rank=rank, alpha=float(rank))  # scale 1
    # All target weights are of this kind, since the adapter was just made.
    weights = [weight for weight in target_weights(model) if isinstance(weight, LowRankWeight)]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight.A.copy_(torch.randn(weight.A.shape, generator=random))
    _backward(model, pieces)
    ranges = {}
    with torch.no_grad():
        for weight in weights:
            L = _range(weight)
            weight.A.zero_()
            weight.B.zero_()
            weight.B[:, : L.shape[1]] = L.to(weight.B)
            ranges[weight.name] = L
    _backward(model, pieces)
    factors = {}
    for weight in weights:
        L = ranges[weight.name]
        assert weight.A.grad is not None
        factors[weight.name] = (L.cpu().bfloat16(), weight.A.grad[: L.shape[1]].cpu().bfloat16())
    without_adapter(model)
    return factors


def _range(weight: LowRankWeight) -> Tensor:
    """An orthonormal basis (out, k) of the gradient of B."""
    assert weight.B.grad is not None
    return torch.linalg.qr(weight.B.grad.float())[0]


def _backward(model: nn.Module, pieces: Sequence[Batch]) -> None:
    """Set the gradients of what is trained to those of the mean loss of all scored tokens."""
    tokens = scored_tokens(pieces)
    model.eval()
    model.zero_grad()
    with progress("gradient", len(pieces), unit="part", shown=distributed.first()) as bar:
        for batch in pieces:
            backward(model, batch, 1 / tokens)
            bar.advance()
