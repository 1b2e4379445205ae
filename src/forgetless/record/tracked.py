"""The leading directions of a covariance, tracked while its rows go by, in 2 n w numbers.

    tracked = Tracked.start(rows, width)
    tracked.add(rows)             # (tokens, n): C += rows^T rows, of which w directions are seen
    tracked.cut(rank, count)      # LowRankCovariance of C / count

Held are a basis Q (n, w) and Z = C Q, which stand for C by the Nystrom approximation
Z (Q^T Z)^-1 Z^T (Tropp et al. 2017, arXiv 1706.05736), and the trace of C, which is exact. Whenever
as many rows have gone by as all before, Q turns to the directions of Z, a step of the block power
method on all that was seen, and what was seen goes along as its approximation. So the directions
get better with every turn, no row is read twice, and the last half of them is seen through
directions that the first half has found.

A row costs 4 n w operations instead of 2 n^2. On inputs and output gradients of three layers of
SmolLM2 (576 and 1,536 wide, 13,100 rows), rank 64 from w = 128 has the energy of trained updates
within 1 to 6 % of that from the whole matrix, which itself is 1 to 18 % below the energy that is
not cut. A basis that never turns (a single-pass sketch) is up to a third off (LOG.md, 2026-11-28).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.importance.covariance import LowRankCovariance, low_rank


@dataclass
class Tracked:
    """A sum C = rows^T rows, seen through `basis`."""

    basis: Tensor  # Q (n, w), orthonormal
    product: Tensor  # Z = C Q (n, w)
    trace: Tensor  # of C, f64
    rows: int = 0
    turn_at: int = 0  # rows at which the basis turns

    @staticmethod
    def start(rows: Tensor, width: int) -> Tracked:
        """Nothing yet, for rows (tokens, n) like these."""
        n = rows.shape[1]
        random = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(random.to(rows))[0]
        trace = torch.zeros((), dtype=torch.float64, device=rows.device)
        return Tracked(basis, torch.zeros_like(basis), trace, turn_at=width)

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, n). The basis turns at the same row however they are split."""
        while len(rows):
            until_turn, rows = rows[: self.turn_at - self.rows], rows[self.turn_at - self.rows :]
            self.product.addmm_(until_turn.T, until_turn @ self.basis)
            self.trace += torch.linalg.vector_norm(until_turn, dtype=torch.float64).square()
            self.rows += len(until_turn)
            if self.rows == self.turn_at:
                self._turn()
                self.turn_at *= 2

    def cut(self, rank: int, count: float) -> LowRankCovariance:
        """Rank `rank` + constant diagonal of the sum divided by `count`, keeping the trace."""
        vectors, values = self._leading()
        return low_rank(values / count, vectors, rank, float(self.trace) / count)

    @staticmethod
    def merged(parts: Sequence[Tracked]) -> Tracked:
        """The sum of several, as different processes have seen them."""
        width = parts[0].basis.shape[1]
        factors = [vectors * values.sqrt() for vectors, values in (p._leading() for p in parts)]
        vectors, values = _of_factor(torch.cat(factors, 1))
        basis, values = vectors[:, :width].contiguous(), values[:width]
        rows = sum(part.rows for part in parts)
        trace = torch.stack([part.trace for part in parts]).sum()
        return Tracked(basis, basis * values, trace, rows, 2 * rows)

    def tensors(self) -> dict[str, Tensor]:
        """What a saved state holds."""
        counts = torch.tensor([float(self.trace), self.rows, self.turn_at], dtype=torch.float64)
        return {"basis": self.basis, "product": self.product, "counts": counts}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], device: torch.device) -> Tracked:
        """What `tensors()` was made of, on a device."""
        counts = tensors["counts"].to(device)
        basis, product = (tensors[key].to(device).clone() for key in ("basis", "product"))
        return Tracked(basis, product, counts[0].clone(), int(counts[1]), int(counts[2]))

    def _turn(self) -> None:
        """Turn the basis to the directions of Z, and Z to what is known of C along them."""
        vectors, values = self._leading()
        self.basis = torch.linalg.qr(self.product)[0]
        self.product = vectors @ (values[:, None] * (vectors.T @ self.basis))

    def _leading(self) -> tuple[Tensor, Tensor]:
        """(orthonormal vectors (n, w), values (w,) falling) of the Nystrom approximation of C.

        A small multiple of the identity is added before, so that Q^T Z has a Cholesky factor also
        where fewer rows than directions were seen, and taken away afterwards.
        """
        if not self.trace:  # of nothing
            return self.basis, self.basis.new_zeros(self.basis.shape[1])
        n = len(self.basis)
        size = torch.linalg.matrix_norm(self.product)
        shift = math.sqrt(n) * torch.finfo(size.dtype).eps * float(size)
        moved = self.product + shift * self.basis
        core = self.basis.T @ moved
        lower = torch.linalg.cholesky((core + core.T) / 2)
        factor = torch.linalg.solve_triangular(lower, moved.T, upper=False).T  # (n, w)
        vectors, values = _of_factor(factor)
        return vectors, (values - shift).clamp(min=0)


def _of_factor(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(orthonormal vectors (n, w), values falling (w,)) of F F^T, for F (n, w)."""
    directions, small = torch.linalg.qr(factor)
    turned, roots, _ = torch.linalg.svd(small)
    return directions @ turned, roots.square()
