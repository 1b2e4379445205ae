"""What one optimizer step did to the effective update U, and the paper's gradient of it: products
of thin factors, (out, q) @ (q, in).

d = U(after) - U(before) = s (dB A_after + B dA)        never the difference of two products, which
                                                        would cancel
g = s (B gA + gB A - eta gB gA)                         "effective" (Song et al. 2025, arXiv
                                                        2501.13669)
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.model.weights import LowRankWeight, TargetWeight, wider

# A sum of products (out, q) @ (q, in).
Products = list[tuple[Tensor, Tensor]]
# A gradient of U, (out, in): whole, or as products of thin factors.
Gradient = Tensor | Products


def is_finite(gradient: Gradient) -> bool:
    """Whether all of a gradient is."""
    if isinstance(gradient, Tensor):
        return bool(torch.isfinite(gradient).all())
    return all(bool(torch.isfinite(factor).all()) for pair in gradient for factor in pair)


def divided_by(gradient: Gradient, scale: float) -> Gradient:
    """gradient / scale, unchanged where the scale is 1."""
    if scale == 1.0:
        return gradient
    if isinstance(gradient, Tensor):
        return gradient / scale
    return [(left / scale, right) for left, right in gradient]


def effective_gradient(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scale: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Factors (out, 2r), (2r, in) of the direction one SGD step of the factors moves U: s (B gA +
    gB A - eta gB gA). A, gA (r, in); B, gB (out, r).
    """
    return scale * torch.cat([B, gB], 1), torch.cat([gA, A - eta * gA], 0)


def low_rank_movement(
    A: Tensor, B: Tensor, A_after: Tensor, B_after: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Factors (out, 2r), (2r, in) of U(after) - U(before) = s (dB A_after + B dA); never the
    difference of two products, which would cancel.
    """
    return scale * torch.cat([B_after - B, B], 1), torch.cat([A_after, A_after - A], 0)


def movement(weight: TargetWeight, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """U(after) - U(before), in f32 or wider: factors (out, 2r), (2r, in) under LoRA, one (out, in)
    tensor for full fine-tuning.
    """
    dtype = wider(weight.parameters[0].dtype)
    now = [p.detach().to(dtype) for p in weight.parameters]
    old = [p.to(dtype) for p in before]
    if isinstance(weight, LowRankWeight):
        return low_rank_movement(old[0], old[1], now[0], now[1], weight.scale)
    return (weight.oriented(now[0] - old[0]),)
