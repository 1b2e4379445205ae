"""The penalty as the paper writes it, through autograd: what every faster one is tested against.

    energy = sum_l c_l * sum_ij Omega_l,ij (U_l,ij - U*_l,ij)^2
    pull   = gradient of strength * energy

There is no factor 1/2. This file builds (out, in) tensors in a graph: it is for reading and
testing, not for training. Source: Song et al. 2025, arXiv 2501.13669.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy(A: Tensor, B: Tensor, scale: float, omega: Tensor, anchor: Tensor) -> Tensor:
    """sum_ij Omega (s B A - U*)^2. A (r, in), B (out, r), omega and anchor (out, in) -> scalar."""
    D = scale * (B @ A) - anchor
    return (omega * D * D).sum()


def pull(
    A: Tensor, B: Tensor, scale: float, omega: Tensor, anchor: Tensor, k: float
) -> tuple[Tensor, Tensor]:
    """Gradients of k * energy with respect to A (r, in) and B (out, r); k = strength * c_l."""
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    with torch.enable_grad():
        gA, gB = torch.autograd.grad(k * energy(A, B, scale, omega, anchor), (A, B))
    return gA, gB


def full_energy(W: Tensor, base: Tensor, omega: Tensor, anchor: Tensor) -> Tensor:
    """The same for full fine-tuning, U = W - base; all (out, in) -> scalar."""
    D = W - base - anchor
    return (omega * D * D).sum()


def factored_energy(D: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """sum_k || diag(sqrt a_k) D diag(sqrt b_k) ||_F^2; D (out, in) -> scalar.

    a_k and b_k are the columns of row (out, k) and col (in, k).
    """
    total = D.new_zeros(())
    for a, b in zip(row.T, col.T, strict=True):
        total = total + (a.sqrt()[:, None] * D * b.sqrt()[None, :]).square().sum()
    return total


def kronecker_energy(D: Tensor, G: Tensor, A_in: Tensor) -> Tensor:
    """tr(G D A_in D^T); G (out, out), A_in (in, in), D (out, in) -> scalar."""
    return torch.trace(G @ D @ A_in @ D.T)
