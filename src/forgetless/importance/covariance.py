"""Covariances of layer inputs and output gradients: a full matrix, or low rank + constant diagonal
V diag(values) V^T + floor I.

Both answer the same questions without ever expanding: `apply` (the matrix times a thin one),
diagonal, trace, Frobenius norm. The low-rank form keeps the top k eigenvectors and spreads what is
left of the trace evenly over the other directions (the maximum-likelihood choice of probabilistic
PCA), so an update drawn at random has the same expected energy as under the full matrix. k n
numbers instead of n^2.

    covariance = Covariance(matrix).cut(16)      # (n, n) -> rank 16 + constant diagonal
    covariance.apply(B)                          # (n, r), for O(n k r)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Covariance:
    """A full symmetric matrix without negative eigenvalues."""

    matrix: Tensor  # (n, n)

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    def rank(self) -> int | None:
        """Rank of the low-rank part; None: the full matrix."""
        return None

    def full(self) -> Tensor:
        """(n, n), f32 (f64 stays f64)."""
        return self.matrix if self.matrix.dtype == torch.float64 else self.matrix.float()

    def diagonal(self) -> Tensor:
        """(n,), f32 or f64."""
        return self.full().diagonal()

    def apply(self, X: Tensor) -> Tensor:
        """The matrix times X (n, r), in the dtype of X."""
        return self.matrix.to(X) @ X

    def trace(self) -> float:
        """Sum of the eigenvalues, in f64."""
        return float(self.matrix.diagonal().double().sum())

    def norm(self) -> float:
        """Frobenius norm, in f64 row by row, so that no f64 copy of the matrix is made."""
        return math.sqrt(
            float(torch.linalg.vector_norm(self.matrix, dim=1, dtype=torch.float64).square().sum())
        )

    def cut(self, rank: int) -> LowRankCovariance:
        """Rank `rank` (at most n) + constant diagonal, keeping the trace."""
        return low_rank(*leading_eigenpairs(self.full(), rank), rank, self.trace())

    def to(self, device: torch.device, dtype: torch.dtype) -> Covariance:
        return Covariance(self.matrix.to(device, dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix."""
        return {"": self.matrix}


@dataclass(frozen=True, eq=False)
class LowRankCovariance:
    """V diag(values) V^T + floor I with orthonormal V; values and floor are not negative."""

    vectors: Tensor  # (n, k)
    values: Tensor  # (k,), above the floor
    floor: Tensor  # scalar

    @property
    def size(self) -> int:
        return self.vectors.shape[0]

    @property
    def rank(self) -> int | None:
        """k."""
        return self.vectors.shape[1]

    def full(self) -> Tensor:
        """(n, n), f32 or f64: for reading and testing."""
        V = self.vectors if self.vectors.dtype == torch.float64 else self.vectors.float()
        return (V * self.values.to(V)) @ V.T + self.floor.to(V) * torch.eye(
            self.size, dtype=V.dtype, device=V.device
        )

    def diagonal(self) -> Tensor:
        """(n,), f32 or f64."""
        V = self.vectors if self.vectors.dtype == torch.float64 else self.vectors.float()
        return V.square() @ self.values.to(V) + self.floor.to(V)

    def apply(self, X: Tensor) -> Tensor:
        """The matrix times X (n, r), in the dtype of X, for O(n k r)."""
        V = self.vectors.to(X)
        return V @ (self.values.to(X)[:, None] * (V.T @ X)) + self.floor.to(X) * X

    def trace(self) -> float:
        """Sum of the eigenvalues, in f64."""
        return float(self.values.double().sum()) + self.size * float(self.floor)

    def norm(self) -> float:
        """Frobenius norm, in f64."""
        top, floor = self.values.double() + self.floor.double(), float(self.floor)
        return math.sqrt(float(top.square().sum()) + (self.size - len(top)) * floor**2)

    def cut(self, rank: int) -> LowRankCovariance:
        """A smaller rank, keeping the trace.

        Raises ValueError for a larger one: what was cut is gone.
        """
        if rank > self.vectors.shape[1]:
            raise ValueError(
                f"the covariances have rank {self.rank}, expected at least {rank}; record again "
                "with more (--cov-rank), or without"
            )
        return low_rank(self.values + self.floor, self.vectors, rank, self.trace())

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRankCovariance:
        return LowRankCovariance(
            self.vectors.to(device, dtype),
            self.values.to(device, dtype),
            self.floor.to(device, dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix."""
        return {".vectors": self.vectors, ".values": self.values, ".floor": self.floor}


AnyCovariance = Covariance | LowRankCovariance


def low_rank(values: Tensor, vectors: Tensor, rank: int, trace: float) -> LowRankCovariance:
    """The first `rank` eigenpairs (values falling, (m,) and (n, m)) and a floor that brings the
    trace to `trace`.
    """
    if rank < 1:
        raise ValueError(f"the rank of a covariance must be at least 1, found {rank}")
    n, k = vectors.shape[0], min(rank, vectors.shape[1])
    top = values[:k].double().clamp(min=0)
    floor = max(0.0, trace - float(top.sum())) / (n - k) if n > k else 0.0
    above = (top - floor).clamp(min=0)
    floor = (
        max(0.0, trace - float(above.sum())) / n
    )  # the same, unless an estimate put the rest above the top
    return LowRankCovariance(
        vectors[:, :k].contiguous(),
        above.to(vectors.dtype),
        torch.tensor(floor, dtype=vectors.dtype, device=vectors.device),
    )


def leading_eigenpairs(
    matrix: Tensor, rank: int, *, exact_below: int = 2048
) -> tuple[Tensor, Tensor]:
    """(values falling, vectors as columns) of a symmetric (n, n) matrix: all of them for small n,
    for large n at least the leading `rank`.

    Large matrices take ten subspace iterations from a fixed random start (Halko et al. 2011, arXiv
    0909.4061) on twice the rank and 32 more: O(n^2 rank) instead of O(n^3), minutes less per layer
    at n = 14,336.
    """
    n, width = matrix.shape[0], 2 * rank + 32
    if n < exact_below or width >= n // 2:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0), vectors.flip(1)
    Q = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(10):
        Q = torch.linalg.qr(matrix @ Q)[0]
    values, small = torch.linalg.eigh(Q.T @ (matrix @ Q))
    return values.flip(0), Q @ small.flip(1)
