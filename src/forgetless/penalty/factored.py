"""The pull for factored importance Omega = sum_k a_k b_k^T: no (out, in) tensor at all.

It is algebra on thin factors. With D = L R, L (out, q), R (q, in),

    energy = sum_k || diag(sqrt a_k) D diag(sqrt b_k) ||_F^2
           = sum_k sum( (L^T a_k L) * (R b_k R^T) )
    P = Omega * D = sum_k a_k L R b_k,      grad_B += 2 k s P A^T,      grad_A += 2 k s B^T P

D comes as the product of its factors (difference.py), so that recorded anchors and initial products
keep it low-rank. Cost: O((out + in) q r) per column of the factors. Twin: reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.importance.entries import FactoredEntry


def pull(
    A: Tensor, B: Tensor, scale: float, omega: FactoredEntry, L: Tensor, R: Tensor, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A (r, in), pull on B (out, r), energy) for D = L @ R.

    Everything is in the dtype of A and B, which the caller has widened to at least f32.
    """
    pull_A, pull_B, energy = torch.zeros_like(A), torch.zeros_like(B), A.new_zeros(())
    for a, b in zip(omega.row.T, omega.col.T, strict=True):  # (out,), (in,)
        aL, Rb = a[:, None] * L, R * b  # (out, q), (q, in)
        energy += torch.sum((L.T @ aL) * (Rb @ R.T))
        pull_A += (B.T @ aL) @ Rb
        pull_B += aL @ (Rb @ A.T)
    return pull_A.mul_(2 * k * scale), pull_B.mul_(2 * k * scale), energy


def full_pull(D: Tensor, omega: FactoredEntry, k: float) -> tuple[Tensor, Tensor]:
    """(pull on W, energy) for full fine-tuning with D = W - W(base) - U*, all (out, in).

    One column of the factors is worked on at a time.
    """
    P = torch.zeros_like(D)
    for a, b in zip(omega.row.T, omega.col.T, strict=True):
        P.addcmul_(a[:, None] * D, b[None, :])
    energy = torch.dot(P.flatten(), D.flatten())
    return P.mul_(2 * k), energy
