"""Tiers: the forms in which importance is stored, and how one becomes another.

    f32, bf16        element by element
    u8, u4           block codes of 8 or 4 bits (codec.py)
    factored[:k]     row @ col^T with k columns. k = 1 (the default):
                     Omega_ij ~ (sum of row i) (sum of column j) / total. k > 1: the non-negative
                     factorisation by the multiplicative updates of Lee and Seung for the divergence
                     sum Omega log(Omega / R) - Omega + R, of which k = 1 by sums is the exact
                     minimum. Sums of columns are kept, and those of rows as far as it has
                     converged: hence the energy of an update whose squares have no pattern
    kronecker[:k]    covariances, whole or as rank k + constant diagonal with the trace kept; only
                     from importance that the kronecker estimator recorded

From kronecker, the element-wise tiers and `factored` take the diagonal, which is exactly of rank 1.
Costs: factored:k with k > 1 takes 2 products with the (out, in) tensor in each of 100 iterations,
kronecker:k one eigendecomposition per covariance. What a tier does to the energy is measured in
energy_errors.py.

    converted(entries, "u8")            # weight name -> entry, all in this tier
    parse_tier("factored:4")            # ("factored", 4)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from forgetless.errors import OptionError, nearest
from forgetless.importance import codec
from forgetless.importance.covariance import AnyCovariance
from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)

# The tiers that hold every element as a number of its own.
NUMBERS = {"f32": torch.float32, "bf16": torch.bfloat16}
TIERS = (*NUMBERS, *codec.BITS, "factored", "kronecker")
# Multiplicative updates of a factorisation.
ITERATIONS = 100


def parse_tier(tier: str) -> tuple[str, int | None]:
    """'factored:4' -> ('factored', 4), 'f32' -> ('f32', None).

    Raises OptionError naming the nearest tier.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::([1-9]\d*))?", tier)
    kind = match.group(1) if match else tier
    if match is None or kind not in TIERS:
        raise OptionError(f"unknown tier '{tier}'; {nearest(kind, TIERS)}")
    if match.group(2) and kind not in ("factored", "kronecker"):
        raise OptionError(
            f"tier '{kind}' has no rank, found '{tier}'; factored:K and kronecker:K do"
        )
    return kind, int(match.group(2)) if match.group(2) else None


def converted(entries: Mapping[str, Entry], tier: str) -> dict[str, Entry]:
    """Every entry in `tier`.

    Raises OptionError for an unknown tier, ValueError where an entry cannot be brought there.
    """
    kind, rank = parse_tier(tier)
    if kind in NUMBERS:
        dtype = NUMBERS[kind]
        return {name: DenseEntry(entry.dense().to(dtype)) for name, entry in entries.items()}
    if kind in codec.BITS:
        return {name: _coded(entry, kind) for name, entry in entries.items()}
    if kind == "factored":
        return {name: _factored(entry, rank or 1) for name, entry in entries.items()}
    # By identity: a covariance that weights share is cut once, and stays shared.
    cut: dict[int, AnyCovariance] = {}
    return {name: _kronecker(name, entry, rank, cut) for name, entry in entries.items()}


def _coded(entry: Entry, kind: str) -> Entry:
    if entry.tier == kind:
        return entry
    return CodedEntry(*codec.encode(entry.dense(), kind), entry.shape, kind)


def _factored(entry: Entry, rank: int) -> FactoredEntry:
    if isinstance(entry, FactoredEntry) and entry.row.shape[1] == rank:
        return entry
    if isinstance(entry, KroneckerEntry):
        return FactoredEntry(
            entry.out_cov.diagonal()[:, None].clone(), entry.in_cov.diagonal()[:, None].clone()
        )
    if isinstance(entry, FactoredEntry) and rank == 1:
        return FactoredEntry(*factors_of_sums(entry.row, entry.col))
    return FactoredEntry(*factorise(entry.dense(), rank))


def _kronecker(
    name: str, entry: Entry, rank: int | None, cut: dict[int, AnyCovariance]
) -> KroneckerEntry:
    if not isinstance(entry, KroneckerEntry):
        raise ValueError(
            f"'{name}' has tier {entry.tier}, which holds no covariances; record with "
            "--estimator kronecker"
        )
    if rank is None:
        if entry.tier != "kronecker":
            raise ValueError(
                f"'{name}' has tier {entry.tier}: what was cut from its covariances is gone; "
                "record again without --cov-rank"
            )
        return entry
    for cov in (entry.out_cov, entry.in_cov):
        if id(cov) not in cut:
            cut[id(cov)] = cov.cut(rank)
    return KroneckerEntry(cut[id(entry.out_cov)], cut[id(entry.in_cov)])


def factors_of_sums(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """The rank-1 form of row @ col^T by its sums of rows and columns.

    (out, k), (in, k) -> (out, 1), (in, 1); the column sums to 1.
    """
    rows, columns = row @ col.sum(0), col @ row.sum(0)
    total = columns.sum().clamp(min=torch.finfo(columns.dtype).tiny)
    return rows[:, None], (columns / total)[:, None]


def factorise(omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(row (out, k), col (in, k)) with row @ col^T near omega (out, in); see the module for the
    sense of near. Columns of `col` sum to 1.
    """
    rows, columns = omega.sum(1), omega.sum(0)
    total = columns.sum()
    if not float(total) > 0:
        return omega.new_zeros(omega.shape[0], rank), omega.new_zeros(omega.shape[1], rank)
    if rank == 1:
        return rows[:, None].clone(), (columns / total)[:, None]
    g = torch.Generator().manual_seed(0)
    row = rows[:, None] / rank * (0.5 + torch.rand(len(rows), rank, generator=g).to(omega))
    col = (columns / total)[:, None] * (0.5 + torch.rand(len(columns), rank, generator=g).to(omega))
    tiny = torch.finfo(omega.dtype).tiny
    for _ in range(ITERATIONS):
        row *= (omega / (row @ col.T).clamp(min=tiny)) @ col / col.sum(0).clamp(min=tiny)
        col *= (omega / (row @ col.T).clamp(min=tiny)).T @ row / row.sum(0).clamp(min=tiny)
    sums = col.sum(0)
    return row * sums, col / sums.clamp(min=tiny)
