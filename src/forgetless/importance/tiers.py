"""What a tier does to the energy: its relative error on two fixed updates U of each weight.

    random     U = L R, rank 8, normal elements: an update that knows nothing of importance
    evading    the same shrunk where importance is large, U / (1 + 100 Omega / mean of Omega), as
               training under a penalty does: it lives on the elements that codes round off first.
               For covariances G, A: L and R are shrunk by the diagonals of G and of A instead

Error = |energy after - energy before| / energy before. Cost per weight: a few passes over an (out,
in) tensor; from covariances to covariances only products with 8 columns.

    random, evading = energy_errors(entry, converted["model.layers.0.mlp.up_proj.weight"])
"""

from __future__ import annotations

import re

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

RANK, SHRINK = 8, 100.0


def energy_errors(before: Entry, after: Entry) -> tuple[float, float]:
    """(random, evading): relative errors of the energy under `after`; 0 where both are zero, 1
    where only `before` is.
    """
    if after is before:
        return 0.0, 0.0
    g = torch.Generator().manual_seed(0)
    out, into = before.shape
    like = next(iter(before.tensors().values()))
    L, R = (
        torch.randn(*shape, generator=g).to(like.device) for shape in ((out, RANK), (RANK, into))
    )
    if isinstance(before, KroneckerEntry):
        shrunk = (
            L / _shrink(before.out_cov.diagonal())[:, None],
            R / _shrink(before.in_cov.diagonal()),
        )
        first, second = (
            _error(_thin_energy(before, *pair), _thin_energy(after, *pair))
            for pair in ((L, R), shrunk)
        )
        return first, second
    U = L @ R
    first = _error(before.energy(U), after.energy(U))
    U /= _shrink(before.dense()).to(U)
    return first, _error(before.energy(U), after.energy(U))


def _shrink(omega: Tensor) -> Tensor:
    """1 + 100 Omega / mean of Omega; 1 where all of it is zero."""
    return 1 + SHRINK * omega / omega.mean().clamp(min=torch.finfo(omega.dtype).tiny)


def _thin_energy(entry: Entry, L: Tensor, R: Tensor) -> Tensor:
    """The energy of L @ R; without the product where the entry has covariances."""
    if not isinstance(entry, KroneckerEntry):
        return entry.energy(L @ R)
    return torch.sum((L.T @ entry.out_cov.apply(L)) * (R @ entry.in_cov.apply(R.T)))


def _error(before: Tensor, after: Tensor) -> float:
    was, now = float(before), float(after)
    return abs(now - was) / was if was > 0 else float(now > 0)


NUMBERS = {"f32": torch.float32, "bf16": torch.bfloat16}
TIERS = (*NUMBERS, *codec.BITS, "factored", "kronecker")
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


def converted(entries: dict[str, Entry], tier: str) -> dict[str, Entry]:
    """Every entry in `tier`.

    Raises OptionError for an unknown tier, ValueError where an entry cannot be brought there.
    """
    kind, rank = parse_tier(tier)
    if kind in NUMBERS:
        return {
            name: DenseEntry(entry.dense().to(NUMBERS[kind])) for name, entry in entries.items()
        }
    if kind in codec.BITS:
        return {
            name: entry
            if entry.tier == kind
            else CodedEntry(*codec.encode(entry.dense(), kind), entry.shape, kind)
            for name, entry in entries.items()
        }
    if kind == "factored":
        return {name: _factored(entry, rank or 1) for name, entry in entries.items()}
    cut: dict[
        int, AnyCovariance
    ] = {}  # by identity: a shared covariance is cut once and stays shared
    return {name: _kronecker(name, entry, rank, cut) for name, entry in entries.items()}


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
    """The rank-1 form, by sums of rows and columns, of row @ col^T:

    (out, k), (in, k) -> (out, 1), (in, 1), the column summing to 1.
    """
    rows, columns = row @ col.sum(0), col @ row.sum(0)
    return rows[:, None], (columns / columns.sum().clamp(min=torch.finfo(columns.dtype).tiny))[
        :, None
    ]


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
