"""The pull for Kronecker importance, energy tr(G D A_in D^T): no (out, in) tensor at all.

It is algebra on thin factors, and low-rank covariances are never expanded.

    D = L R,  L (out, q), R (q, in);      energy = sum( (L^T G L) * (R A_in R^T) )
    grad_B += 2 k s (G L) (R A_in A^T),   grad_A += 2 k s (B^T G L) (R A_in)

Without an anchor D = s B A, and this becomes

    grad_B += 2 k s^2 G B (A A_in A^T),     grad_A += 2 k s^2 (B^T G B) A A_in

Cost: two products of a covariance with a thin matrix, which is O(n^2 q) for whole covariances and
O(n rank q) for low-rank ones. Twin: reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.importance.entries import KroneckerEntry


def pull(
    A: Tensor, B: Tensor, scale: float, omega: KroneckerEntry, L: Tensor, R: Tensor, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A (r, in), pull on B (out, r), energy) for D = L @ R.

    Everything is in the dtype of A and B, which the caller has widened to at least f32.
    """
    GL = omega.out_cov.apply(L)  # (out, q)
    RA = omega.in_cov.apply(R.T).T  # (q, in)
    energy = torch.sum((L.T @ GL) * (RA @ R.T))
    return ((B.T @ GL) @ RA).mul_(2 * k * scale), (GL @ (RA @ A.T)).mul_(2 * k * scale), energy


def full_pull(D: Tensor, omega: KroneckerEntry, k: float) -> tuple[Tensor, Tensor]:
    """(pull on W, energy) for full fine-tuning with D = W - W(base) - U*, all (out, in).

    It costs two products with the covariances.
    """
    P = omega.in_cov.apply(omega.out_cov.apply(D).T).T
    energy = torch.sum(P * D)
    return P.mul(2 * k), energy
