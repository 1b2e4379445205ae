"""The penalty as the paper writes it (Song et al. 2025, arXiv 2501.13669), through autograd: the specification that every faster one is tested against.

    energy = sum_l c_l * sum_ij Omega_l,ij (U_l,ij - U*_l,ij)^2          pull = gradient of strength * energy

No factor 1/2. Builds (out, in) tensors in a graph: for reading and testing, not for training.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy(A: Tensor, B: Tensor, scale: float, omega: Tensor, anchor: Tensor) -> Tensor:
    """sum_ij Omega (s B A - U*)^2. A (r, in), B (out, r), omega and anchor (out, in) -> scalar."""
    D = scale * (B @ A) - anchor
    return (omega * D * D).sum()


def pull(A: Tensor, B: Tensor, scale: float, omega: Tensor, anchor: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Gradients of k * energy with respect to A (r, in) and B (out, r); k = strength * c_l."""
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    with torch.enable_grad():
        gA, gB = torch.autograd.grad(k * energy(A, B, scale, omega, anchor), (A, B))
    return gA, gB


def full_energy(W: Tensor, base: Tensor, omega: Tensor, anchor: Tensor) -> Tensor:
    """The same for full fine-tuning, U = W - base; all (out, in) -> scalar."""
    D = W - base - anchor
    return (omega * D * D).sum()
