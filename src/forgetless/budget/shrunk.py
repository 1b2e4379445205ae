"""Shrink a finished update along what matters: less where general ability lives, the rest as it
was. Pure functions on thin factors; no model.

    closed form   V = argmin ||V - U||^2 + mu E(V),  E the energy of the importance entry
                  elements and factored:  V_ij = U_ij / (1 + mu Omega_ij)
                  kronecker:              the same with g_i a_j in the eigenbases of G and A
    re-factored   the same argmin over rank-r updates V = L R: alternating least squares from the
                  truncated SVD of the closed form. Truncation alone is the nearest rank-r update in
                  ||.||, not in this metric, and can bring removed energy back. Each half step is
                  solved exactly, so the objective never rises; it starts no worse than U itself, so
                  the energy never does either

mu is in units of the `typical` importance, sum of E(U) over sum of ||U||^2 (the mean that this
update meets): a direction of typical importance is halved at mu = 1, whatever the unit of the file,
and uniform importance only scales, by 1 / (1 + mu). Nothing published is followed.

Cost per weight and sweep, in f64 (rank r, covariance rank k):

    kronecker:k         O((out + in)(k + r) r), no (out, in) tensor
    whole covariances   O(out^2 r + in^2 r), after one eigendecomposition each, O(n^3)
    factored            O((out + in) k r^2)
    by element          O(out in r^2)

Memory is O((out + in) r^2). By element and factored, the start holds one (out, in) tensor.

    form = prepared(importance[name], device, {})      # shrink_forms.py
    L, R = refactored(form, L, R, mu=2.0 / typical([(form, L, R)]))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forgetless.budget.shrink_forms import Form
from forgetless.importance.entries import Entry, KroneckerEntry

# The most sweeps of the fit.
SWEEPS = 20
# A sweep that lowers the objective by less than this fraction of it ends the fit.
SETTLED = 1e-5
# A matrix with a side that is no longer than this gets a whole singular value decomposition.
EXACT_BELOW = 512


def distance(L: Tensor, R: Tensor, L2: Tensor, R2: Tensor) -> Tensor:
    """||L R - L2 R2||^2 from small matrices; f64, since the terms nearly cancel."""
    left, right = torch.cat([L, -L2], 1), torch.cat([R, R2])
    return ((left.T @ left) * (right @ right.T)).sum()


def objective(form: Form, L: Tensor, R: Tensor, L2: Tensor, R2: Tensor, mu: float) -> float:
    """||V - U||^2 + mu E(V) of V = L2 R2 for U = L R."""
    return float(distance(L, R, L2, R2) + mu * form.energy(L2, R2))


def truncated(form: Form, L: Tensor, R: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """The closed form cut to the rank of L R by its SVD: where the fit starts, and what it must
    beat.
    """
    P, core, Q = form.closed(L, R, mu)
    left, values, right = _leading(core, R @ Q.T if Q.numel() else R)
    left = left * values
    return (P @ left if P.numel() else left), (right @ Q if Q.numel() else right)


def refactored(
    form: Form, L: Tensor, R: Tensor, mu: float, *, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """L' (out, r), R' (r, in) with the least ||L' R' - L R||^2 + mu E(L' R') that alternating least
    squares finds from the truncated SVD; f64.
    """
    L, R = L.double(), R.double()
    if mu == 0 or not bool(L.any()) or not bool(R.any()):
        return L, R
    best = truncated(form, L, R, mu)
    least = objective(form, L, R, *best, mu)
    unchanged = objective(form, L, R, L, R, mu)
    if least > unchanged:
        best, least = (L, R), unchanged
    for _ in range(sweeps):
        Q = torch.linalg.qr(best[1].T)[0].T
        P = torch.linalg.qr(form.fit(L, R, Q, mu))[0]
        fitted = P, form.T.fit(R.T, L.T, P.T, mu).T
        value = objective(form, L, R, *fitted, mu)
        if not value < least:  # at the minimum, up to rounding
            break
        settled = least - value < SETTLED * least
        best, least = fitted, value
        if settled:
            break
    return balanced(*best, rank=R.shape[0])


def balanced(L: Tensor, R: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """The same product with factors of equal size, so that neither loses digits where it is stored;
    with zeros up to `rank`, which may exceed the weight.
    """
    P, S = torch.linalg.qr(L)
    left, values, right = torch.linalg.svd(S @ R, full_matrices=False)
    root, missing = values.sqrt(), rank - len(values)
    pad = torch.nn.functional.pad
    return pad(P @ left * root, (0, missing)), pad(root[:, None] * right, (0, 0, 0, missing))


def typical(parts: Sequence[tuple[Form, Tensor, Tensor]]) -> float:
    """The mean importance that an update meets: sum of E(L R) over sum of ||L R||^2.

    Raises ValueError where there is none.
    """
    energy = sum(float(form.energy(L.double(), R.double())) for form, L, R in parts)
    size = sum(
        float(((L.double().T @ L.double()) * (R.double() @ R.double().T)).sum())
        for _, L, R in parts
    )  # ||L R||^2 from r x r matrices
    if not (size > 0 and energy > 0 and math.isfinite(energy / size)):
        what = "the update is zero" if not size > 0 else f"its energy is {energy:g}"
        raise ValueError(
            f"nothing to shrink: {what}; expected a trained adapter, and importance above zero "
            "on its weights"
        )
    return energy / size


def _leading(matrix: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left (m, r), values, right (r, n)) of the r leading singular values, r the rows of `near`: a
    whole SVD where a side is small, else by eight subspace iterations from `near` and eight fixed
    random rows.
    """
    rank = near.shape[0]
    if min(matrix.shape) <= max(EXACT_BELOW, 2 * rank + 16):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    extra = torch.randn(8, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix)
    Q = torch.linalg.qr(torch.cat([near, extra]).T)[0]
    for _ in range(8):
        Q = torch.linalg.qr(matrix.T @ (matrix @ Q))[0]
    left, values, right = torch.linalg.svd(matrix @ Q, full_matrices=False)
    return left[:, :rank], values[:rank], (right @ Q.T)[:rank]


def reference(entry: Entry, U: Tensor, mu: float, within: Tensor | None = None) -> Any:
    """Slow and readable twin of `closed` and `fit`, by one (out in, out in) system in f64: the V
    (out, in) with the least ||V - U||^2 + mu E(V), of all, or among V = X @ within for rows
    `within` (r, in).
    """
    m, n = entry.shape
    form = (
        torch.kron(entry.out_cov.full(), entry.in_cov.full())
        if isinstance(entry, KroneckerEntry)
        else torch.diag(entry.dense().flatten())
    )
    system = torch.eye(m * n, dtype=torch.float64) + mu * form.double()
    if within is None:
        return torch.linalg.solve(system, U.double().flatten()).view(m, n)
    lift = torch.kron(
        torch.eye(m, dtype=torch.float64), within.double().T.contiguous()
    )  # (out in, out r): X.flatten() -> (X @ within).flatten()
    X = torch.linalg.solve(lift.T @ system @ lift, lift.T @ U.double().flatten())
    return (lift @ X).view(m, n)
