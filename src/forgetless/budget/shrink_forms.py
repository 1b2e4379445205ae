"""Forms of importance as shrinking sees them: the energy of a thin update V, and the least of
||V - U||^2 + mu E(V) over all V, or over those with given rows.

    elements, factored   E(V) = sum_ij Omega_ij V_ij^2
    kronecker            E(V) = tr(G V A V^T), by the eigenbases of G and A

    form = prepared(importance[name], device, {})
    form.energy(L, R)                 # of V = L R
    P, core, Q = form.closed(L, R, mu)
    X = form.fit(L, R, Q, mu)         # V = X Q has the least, among all X
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.importance.covariance import AnyCovariance, LowRankCovariance
from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)

# Elements of importance that are widened to f64 at a time.
WIDENED_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Elements:
    """E(V) = sum_ij Omega_ij V_ij^2, seen from either side."""

    entry: DenseEntry | CodedEntry | FactoredEntry
    transposed: bool = False

    @property
    def T(self) -> Elements:
        """The same for V^T."""
        return Elements(self.entry, not self.transposed)

    def times(self, X: Tensor) -> Tensor:
        """Omega @ X: (in, q) -> (out, q), a few rows of Omega at a time."""
        if isinstance(self.entry, FactoredEntry):
            row, col = self.entry.row.to(X), self.entry.col.to(X)
            return col @ (row.T @ X) if self.transposed else row @ (col.T @ X)
        height, width = self.entry.shape
        some = max(1, WIDENED_AT_ONCE // width)
        blocks = [slice(start, min(start + some, height)) for start in range(0, height, some)]
        if not self.transposed:
            return torch.cat([self.entry.rows(block).to(X) @ X for block in blocks])
        total = X.new_zeros(width, X.shape[1])
        for block in blocks:
            total += self.entry.rows(block).to(X).T @ X[block]
        return total

    def energy(self, L: Tensor, R: Tensor) -> Tensor:
        """E(L R), through products of pairs of directions."""
        i, j = _index_pairs(R.shape[0], R.device)
        weight = torch.where(i == j, 1.0, 2.0).to(R)
        return (L[:, i] * L[:, j] * weight * self.times(R.T[:, i] * R.T[:, j])).sum()

    def fit(self, L: Tensor, R: Tensor, Q: Tensor, mu: float) -> Tensor:
        """The X that minimises ||X Q - L R||^2 + mu E(X Q) for orthonormal rows Q (r, in): one r x
        r system per row of X, (out, r).
        """
        i, j = _index_pairs(Q.shape[0], Q.device)
        sums = self.times(Q.T[:, i] * Q.T[:, j])  # (out, pairs)
        grams = sums.new_empty(len(sums), Q.shape[0], Q.shape[0])
        grams[:, i, j] = grams[:, j, i] = mu * sums
        grams.diagonal(dim1=1, dim2=2).add_(1.0)
        return torch.linalg.solve(grams, L @ (R @ Q.T))

    def closed(self, L: Tensor, R: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        """The closed form, as (out, in) between two identities that are left out (empty)."""
        U = L @ R
        omega = self.entry.dense().to(U)
        none = U.new_empty(0)
        return none, U / (1 + mu * (omega.T if self.transposed else omega)), none


@dataclass(frozen=True, eq=False)
class Basis:
    """V diag(values - floor) V^T + floor I with exactly orthonormal V (n, k): the eigenvectors of a
    covariance that stand out.
    """

    vectors: Tensor
    values: Tensor
    floor: float

    def gram(self, X: Tensor) -> Tensor:
        """X^T C X for X (n, r)."""
        inner = self.vectors.T @ X
        return inner.T @ ((self.values - self.floor)[:, None] * inner) + self.floor * (X.T @ X)

    def solve(self, X: Tensor, weights: Tensor) -> Tensor:
        """(I + weights_c C)^-1 applied to each column c of X (n, r)."""
        rest = 1 / (1 + weights * self.floor)
        inner = self.vectors.T @ X
        return rest * X + self.vectors @ (inner * (1 / (1 + self.values[:, None] * weights) - rest))


@dataclass(frozen=True, eq=False)
class Covariances:
    """E(V) = tr(G V A V^T)."""

    out: Basis
    into: Basis

    @property
    def T(self) -> Covariances:
        """The same for V^T."""
        return Covariances(self.into, self.out)

    def energy(self, L: Tensor, R: Tensor) -> Tensor:
        """E(L R), from r x r matrices."""
        return (self.out.gram(L) * self.into.gram(R.T)).sum()

    def fit(self, L: Tensor, R: Tensor, Q: Tensor, mu: float) -> Tensor:
        """The X that minimises ||X Q - L R||^2 + mu E(X Q) for orthonormal rows Q (r, in).

        X + mu G X (Q A Q^T) = L R Q^T; in the eigenbasis of Q A Q^T, (r, r), every column is a
        system in G alone.
        """
        weights, turn = torch.linalg.eigh(self.into.gram(Q.T))
        return self.out.solve(L @ (R @ Q.T) @ turn, mu * weights.clamp(min=0)) @ turn.T

    def closed(self, L: Tensor, R: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor]:
        """The closed form as P core Q with orthonormal columns of P and rows of Q: covariance
        directions first, then what of U lies outside of them.
        """
        out, into = self.out, self.into
        inside = out.vectors.T @ L  # (k, r)
        within = R @ into.vectors  # (r, k')
        P, outside = torch.linalg.qr(L - out.vectors @ inside)
        Q, without = torch.linalg.qr((R - within @ into.vectors.T).T)
        left = torch.cat([inside, outside])
        right = torch.cat([within, without.T], 1)
        g = torch.cat([out.values, out.values.new_full((len(outside),), out.floor)])
        a = torch.cat([into.values, into.values.new_full((len(without),), into.floor)])
        core = (left @ right) / (1 + mu * torch.outer(g, a))
        return torch.cat([out.vectors, P], 1), core, torch.cat([into.vectors, Q], 1).T


Form = Elements | Covariances


def prepared(
    entry: Entry, device: torch.device, bases: dict[int, tuple[AnyCovariance, Basis]]
) -> Form:
    """The form of one weight's importance, on `device`; eigenbases are kept in `bases`, by
    identity, so that a shared covariance is decomposed once.

    The covariance is kept beside its basis: once it were gone, another could have its identity.
    """
    if isinstance(entry, KroneckerEntry):
        for cov in (entry.out_cov, entry.in_cov):
            if id(cov) not in bases:
                bases[id(cov)] = (cov, basis(cov.to(device, torch.float64)))
        return Covariances(bases[id(entry.out_cov)][1], bases[id(entry.in_cov)][1])
    assert isinstance(entry, (DenseEntry, CodedEntry, FactoredEntry)), type(entry)
    return Elements(entry.to(device, torch.float64, {}))


def basis(cov: AnyCovariance) -> Basis:
    """The eigenbasis of a covariance in its own dtype.

    Stored directions are made orthonormal again: those in bf16 are so to three digits only.
    """
    if isinstance(cov, LowRankCovariance):
        Q, S = torch.linalg.qr(cov.vectors)
        values, turn = torch.linalg.eigh((S * cov.values) @ S.T)
        return Basis(Q @ turn, values.clamp(min=0) + cov.floor, float(cov.floor))
    values, vectors = torch.linalg.eigh(cov.full())
    return Basis(vectors, values.clamp(min=0), 0.0)


def _index_pairs(rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices i <= j of all pairs of `rank` directions."""
    i, j = torch.triu_indices(rank, rank, device=device)
    return i, j
