"""The pull in closed form, for element-wise importance.

With D = U - U*, P = Omega * D and k = strength * c_l,

    grad_B += 2 k s P A^T        grad_A += 2 k s B^T P        energy = sum P * D

It works on one weight at a time, in two (out, in) buffers that are freed on return: no graph, and
nothing kept between steps. The file is the slow twin of tiled.py and fused.py; its own twin is
reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pull(
    A: Tensor, B: Tensor, scale: float, omega: Tensor, anchor: Tensor | None, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A (r, in), pull on B (out, r), energy) for U = scale * B @ A.

    U is held towards `anchor` (out, in), or towards zero. Everything is in the dtype of A and B,
    which the caller has widened to at least f32.
    """
    D = torch.mm(B, A).mul_(scale)  # (out, in)
    if anchor is not None:
        D.sub_(anchor)
    P = omega * D  # (out, in)
    energy = torch.dot(P.flatten(), D.flatten())
    return torch.mm(B.T, P).mul_(2 * k * scale), torch.mm(P, A.T).mul_(2 * k * scale), energy


def full_pull(D: Tensor, omega: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """(pull on W, energy) for full fine-tuning with D = W - W(base) - U*, all (out, in)."""
    P = omega * D
    energy = torch.dot(P.flatten(), D.flatten())
    return P.mul_(2 * k), energy
