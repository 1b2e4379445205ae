"""What stands after the optimizer's step in place of a pull before it: the update is taken back as
far as the curvature of Kronecker importance says, exactly and at any strength.

With U the update of a weight, G and C the covariances of its output gradients and its inputs, and
their eigenvalues g_i and c_j, the curvature of the pair (i, j) of directions is g_i c_j.

    proximal    min over U' of  ||U' - U||^2 / 2 + t tr(G U' C U'^T):
                U'_ij = U_ij / (1 + 2 t g_i c_j), with t = learning rate x strength x coefficient
    project     its limit for the pairs of high curvature alone: U'_ij = 0 there, and U_ij elsewhere

In full fine-tuning that is all: `filtered`. Under LoRA, U = s B A, the quadratic is solved for A
with B as it is, then for B:

    A' + 2 t s^2 (B^T G B) A' C = A

which is one r x r eigenproblem, and Woodbury's formula where covariances are low rank + constant
diagonal (`solved_factor`); for the limit each direction of the inputs has an r x r problem of its
own (`projected_factor`). `reference_factor` is the slow twin of both: one dense system.

Nothing goes through Adam's moments, which divide a pull by the root of their second moment, as they
did with L2 before AdamW (arXiv 1711.05101). Projecting steps off high curvature by Kronecker
factors is CrispEdit's (arXiv 2602.15823), for full weights and on the gradient before Adam; here
the update itself is projected, so that Adam cannot leave the subspace.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.importance.covariance import AnyCovariance, LowRankCovariance
from forgetless.importance.entries import KroneckerEntry

# Part of the squared size of the other factor below which a direction counts as absent from it:
# rounding in f32 leaves 1e-14 of it.
ABSENT = 1e-10


@dataclass(frozen=True)
class Directions:
    """The eigenvectors (n, k) of a covariance, their eigenvalues (k,), and the one eigenvalue of
    all directions beside them, of which there are n - k.
    """

    vectors: Tensor
    values: Tensor
    floor: Tensor

    @property
    def beside(self) -> int:
        """How many directions there are beside the eigenvectors."""
        return self.vectors.shape[0] - self.vectors.shape[1]

    def all_values(self) -> Tensor:
        """(k + 1,): the eigenvalues and, last, that of all others; 0 where there are no others."""
        last = self.floor if self.beside else torch.zeros_like(self.floor)
        return torch.cat([self.values, last[None]])


def directions(covariance: AnyCovariance) -> Directions:
    """The eigenvectors of a covariance; a whole one is decomposed, which is O(n^3)."""
    if isinstance(covariance, LowRankCovariance):
        floor = covariance.floor
        return Directions(covariance.vectors, covariance.values + floor, floor)
    values, vectors = torch.linalg.eigh(covariance.full())
    return Directions(vectors, values.clamp(min=0), values.new_zeros(()))


def curvature_table(outputs: Directions, inputs: Directions) -> Tensor:
    """g_i c_j, (k + 1, l + 1): the last row and column are those of all other directions."""
    return torch.outer(outputs.all_values(), inputs.all_values())


def protected_pairs(outputs: Directions, inputs: Directions, fraction: float) -> Tensor:
    """Which pairs of directions have the most curvature: as many, from the largest down, as have at
    most `fraction` of the whole, but at least one. Booleans (k + 1, l + 1).

    The pairs with one of the other directions count as often as there are such, and are taken or
    left together.
    """
    table = curvature_table(outputs, inputs).double()
    counts = torch.outer(_how_many(outputs), _how_many(inputs))
    values, order = table.flatten().sort(descending=True, stable=True)
    energy = values * counts.flatten()[order]
    within = energy.cumsum(0) <= fraction * energy.sum()
    within[0] = True
    taken = torch.zeros_like(within)
    taken[order] = within & (energy > 0)
    return taken.view(table.shape)


def _how_many(side: Directions) -> Tensor:
    """How many directions each of `all_values` stands for."""
    counts = torch.ones(len(side.values) + 1, dtype=torch.float64, device=side.values.device)
    counts[-1] = side.beside
    return counts


def filtered(U: Tensor, outputs: Directions, inputs: Directions, factors: Tensor) -> Tensor:
    """U (out, in) with its part in each pair of directions multiplied by `factors` (k + 1, l + 1).

    It costs four thin products.
    """
    V, W = outputs.vectors, inputs.vectors
    both = factors[-1, -1]
    left, right = factors[:-1, -1] - both, factors[-1, :-1] - both
    rows, columns = V.T @ U, U @ W
    core = factors[:-1, :-1] - both - left[:, None] - right
    return (
        both * U + V @ (left[:, None] * rows + (core * (rows @ W)) @ W.T) + (columns * right) @ W.T
    )


def solved_factor(X: Tensor, K: Tensor, side: Directions, t: float) -> Tensor:
    """X' (r, n) with X' + t K X' C = X, for a symmetric K (r, r) >= 0 and the covariance C of
    `side`.
    """
    values, Q = torch.linalg.eigh(K)
    steps = t * values.clamp(min=0)[:, None]  # (r, 1)
    Y = Q.T @ X
    kept = 1 + steps * side.floor if side.beside else torch.ones_like(steps)
    # (I + steps C)^-1 is 1 / kept beside the eigenvectors, and 1 / (1 + steps values) on them.
    less = 1 / (1 + steps * side.values) - 1 / kept
    return Q @ (Y / kept + ((Y @ side.vectors) * less) @ side.vectors.T)


def projected_factor(
    X: Tensor, other: Tensor, side: Directions, other_side: Directions, protected: Tensor
) -> Tensor:
    """The X' (r, n) nearest to X for which other @ X' has nothing in the protected pairs.

    `other` (m, r) is the other factor; `protected` (k + 1, l + 1) has its directions in rows.
    """
    other = other.double()
    seen = other_side.vectors.double().T @ other  # (k, r)
    beside = other.T @ other - seen.T @ seen
    table = protected.double()
    K = torch.einsum("ip,ij,iq->jpq", seen, table[:-1], seen) + table[-1][:, None, None] * beside
    values, Q = torch.linalg.eigh(K)  # for each direction of X: what its columns must not be along
    absent = ABSENT * other.square().sum()
    free = (values <= torch.maximum(absent, 1e-6 * values[:, -1:])).to(Q)
    allowed = (Q * free[:, None, :]) @ Q.mT  # (l + 1, r, r)
    along = X.double() @ side.vectors.double()  # (r, l)
    rest = X.double() - along @ side.vectors.double().T
    along = torch.einsum("jpq,qj->pj", allowed[:-1], along)
    return (along @ side.vectors.double().T + allowed[-1] @ rest).to(X.dtype)


def reference_factor(X: Tensor, other: Tensor, G: Tensor, C: Tensor, t: float) -> Tensor:
    """min over X' of ||X' - X||^2 / 2 + t / 2 tr(G other X' C X'^T other^T), by one dense system.

    It is the specification of `solved_factor`: X (r, n), other (m, r), G (m, m), C (n, n), in f64.
    """
    K = other.T @ G @ other
    system = torch.eye(X.numel(), dtype=X.dtype) + t * torch.kron(K, C)
    return torch.linalg.solve(system, X.flatten()).view(X.shape)


@dataclass(frozen=True)
class Sides:
    """The directions of a weight's outputs and inputs, and the pairs that `project` protects."""

    outputs: Directions
    inputs: Directions
    protected: Tensor | None = None

    def factors(self, t: float) -> Tensor:
        """What each pair of U is multiplied by in full fine-tuning."""
        if self.protected is not None:
            return (~self.protected).to(self.outputs.values)
        return 1 / (1 + 2 * t * curvature_table(self.outputs, self.inputs))

    def energy(self, L: Tensor, R: Tensor) -> Tensor:
        """tr(G L R C R^T L^T) for thin L (out, q) and R (q, in)."""
        return (_quadratic(L.T, self.outputs) * _quadratic(R, self.inputs)).sum()

    def step(self, A: Tensor, B: Tensor, scale: float, t: float) -> tuple[Tensor, Tensor]:
        """(A', B') after the step, A (r, in) first, then B (out, r)."""
        if self.protected is not None:
            A = projected_factor(A, B, self.inputs, self.outputs, self.protected)
            BT = projected_factor(B.T, A.T, self.outputs, self.inputs, self.protected.T)
            return A, BT.T
        A = solved_factor(A, _quadratic(B.T, self.outputs), self.inputs, 2 * t * scale**2)
        return A, solved_factor(B.T, _quadratic(A, self.inputs), self.outputs, 2 * t * scale**2).T


def sides_of(entry: KroneckerEntry, protect: float | None = None) -> Sides:
    """The directions of an entry's covariances; with `protect` the pairs that have that fraction of
    the curvature.
    """
    outputs, inputs = directions(entry.out_cov), directions(entry.in_cov)
    pairs = None if protect is None else protected_pairs(outputs, inputs, protect)
    return Sides(outputs, inputs, pairs)


def _quadratic(X: Tensor, side: Directions) -> Tensor:
    """X C X^T, (r, r), for X (r, n)."""
    along = X @ side.vectors
    less = side.values - side.floor if side.beside else side.values
    inside = (along * less) @ along.T
    return inside + side.floor * (X @ X.T) if side.beside else inside
