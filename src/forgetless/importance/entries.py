"""Entries: the importance of one weight, in one of several forms with one contract.

    dense       Omega element by element                   energy  sum_ij Omega_ij U_ij^2
    coded       the same in 8 or 4 bits, decoded a few     the same
                rows at a time
    factored    Omega = row @ col^T, (out, k), (in, k)     the same, without an (out, in) tensor
    kronecker   G (out, out) and A (in, in), which also    energy  tr(G U A U^T)
                know directions

Each has `shape` (out, in), `tier` (how it is stored), `dense()` -> (out, in), `rows(slice)` of it,
`energy(U)`, `norm()` (Frobenius norm of the quadratic form, so that coefficients of layers compare
across forms), `to(device, dtype, moved)` and `tensors()` (what a file holds, by suffix of the
weight's name). The penalty picks its algebra by type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from forgetless.importance import codec
from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance

Part = TypeVar("Part")


class Entry(Protocol):
    """What every form of importance of one weight answers."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def tier(self) -> str: ...
    def dense(self) -> Tensor: ...
    def rows(self, rows: slice) -> Tensor: ...
    def energy(self, U: Tensor) -> Tensor: ...
    def norm(self) -> float: ...
    def to(self, device: torch.device, dtype: torch.dtype, moved: dict[Any, Any]) -> Entry: ...
    def tensors(self) -> dict[str, Tensor]: ...


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class DenseEntry:
    """Importance of one weight, element by element; the unit is that of the estimator (path: nats
    per squared weight).
    """

    values: Tensor  # (out, in), f32 or bf16, non-negative

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @property
    def tier(self) -> str:
        names = {torch.float32: "f32", torch.bfloat16: "bf16"}
        return names.get(self.values.dtype, str(self.values.dtype))

    def dense(self) -> Tensor:
        """(out, in), f32 (f64 stays f64)."""
        return _wide(self.values)

    def rows(self, rows: slice) -> Tensor:
        """Some rows, (rows, in), in the stored dtype."""
        return self.values[rows]

    def to(self, device: torch.device, dtype: torch.dtype, moved: dict[Any, Any]) -> DenseEntry:
        """On a device, as stored: the pull widens a few rows at a time."""
        return self if self.values.device == device else DenseEntry(self.values.to(device))

    def energy(self, U: Tensor) -> Tensor:
        """sum_ij Omega_ij U_ij^2, a scalar; U is (out, in)."""
        return (self.dense().to(U) * U * U).sum()

    def norm(self) -> float:
        """Frobenius norm, accumulated in f64."""
        return float(self.values.double().norm())

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix."""
        return {"": self.values}


@dataclass(frozen=True)
class CodedEntry:
    """Importance of one weight in block codes (codec.py); decoded a few rows at a time wherever it
    is used.
    """

    codes: Tensor  # u8 (out, in), or two to a byte (out, ceil(in / 2)) in u4
    scale: Tensor  # bf16 (out, ceil(in / 128))
    shape: tuple[int, int]  # (out, in)
    tier: str  # "u8" or "u4"

    def dense(self) -> Tensor:
        """(out, in), f32: all of it decoded, for looking at; training reads rows."""
        return codec.decode(self.codes, self.scale, self.shape, self.tier)

    def rows(self, rows: slice) -> Tensor:
        """Some rows, (rows, in), f32."""
        return codec.decode(self.codes, self.scale, self.shape, self.tier, rows)

    def to(self, device: torch.device, dtype: torch.dtype, moved: dict[Any, Any]) -> CodedEntry:
        """On a device, still in codes."""
        if self.codes.device == device:
            return self
        return CodedEntry(self.codes.to(device), self.scale.to(device), self.shape, self.tier)

    def energy(self, U: Tensor) -> Tensor:
        """sum_ij Omega_ij U_ij^2, a scalar; U is (out, in)."""
        return (self.dense().to(U) * U * U).sum()

    def norm(self) -> float:
        """Frobenius norm, accumulated in f64."""
        return codec.norm(self.codes, self.scale, self.shape, self.tier)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix; shape and tier stand in its metadata."""
        return {".codes": self.codes, ".scale": self.scale}


@dataclass(frozen=True, eq=False)
class FactoredEntry:
    """Omega = row @ col^T, both non-negative: k (out + in) numbers."""

    row: Tensor  # (out, k)
    col: Tensor  # (in, k)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.row.shape[0], self.col.shape[0])

    @property
    def tier(self) -> str:
        return "factored" if self.row.shape[1] == 1 else f"factored:{self.row.shape[1]}"

    def dense(self) -> Tensor:
        """row @ col^T, (out, in), f32 (f64 stays f64)."""
        return _wide(self.row) @ _wide(self.col).T

    def rows(self, rows: slice) -> Tensor:
        """Some rows, (rows, in), f32."""
        return _wide(self.row[rows]) @ _wide(self.col).T

    def energy(self, U: Tensor) -> Tensor:
        """sum_ij Omega_ij U_ij^2, a scalar; U is (out, in)."""
        return (self.row.to(U) * ((U * U) @ self.col.to(U))).sum()

    def norm(self) -> float:
        """Frobenius norm of Omega, from k x k matrices in f64."""
        row, col = self.row.double(), self.col.double()
        return math.sqrt(max(0.0, float(((row.T @ row) * (col.T @ col)).sum())))

    def to(self, device: torch.device, dtype: torch.dtype, moved: dict[Any, Any]) -> FactoredEntry:
        """On a device, in a dtype; `moved` is for entries that share parts."""
        return FactoredEntry(self.row.to(device, dtype), self.col.to(device, dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix."""
        return {".row": self.row, ".col": self.col}


@dataclass(frozen=True, eq=False)
class KroneckerEntry:
    """G = E[d d^T] of output gradients and A = E[x x^T] of inputs.

    Weights that read the same input share one `in_cov` object.
    """

    out_cov: AnyCovariance  # G, (out, out)
    in_cov: AnyCovariance  # A, (in, in)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_cov.size, self.in_cov.size)

    @property
    def tier(self) -> str:
        ranks = [cov.rank for cov in (self.out_cov, self.in_cov) if cov.rank is not None]
        return f"kronecker:{max(ranks)}" if ranks else "kronecker"

    def dense(self) -> Tensor:
        """diag(G) diag(A)^T, (out, in): only the diagonal of the quadratic form.

        What the covariances know of directions is lost in it.
        """
        return torch.outer(self.out_cov.diagonal(), self.in_cov.diagonal())

    def rows(self, rows: slice) -> Tensor:
        """Some rows of `dense()`, (rows, in)."""
        return torch.outer(self.out_cov.diagonal()[rows], self.in_cov.diagonal())

    def energy(self, U: Tensor) -> Tensor:
        """tr(G U A U^T), a scalar; U is (out, in)."""
        return (self.in_cov.apply(self.out_cov.apply(U).T).T * U).sum()

    def norm(self) -> float:
        """Frobenius norm of the quadratic form: ||G||_F ||A||_F."""
        return self.out_cov.norm() * self.in_cov.norm()

    def to(self, device: torch.device, dtype: torch.dtype, moved: dict[Any, Any]) -> KroneckerEntry:
        """On a device, in a dtype; covariances already in `moved` (by identity) are taken from
        there, so that shared ones stay shared.
        """
        for cov in (self.out_cov, self.in_cov):
            if (id(cov), device) not in moved:
                moved[id(cov), device] = cov.to(device, dtype)
        return KroneckerEntry(moved[id(self.out_cov), device], moved[id(self.in_cov), device])

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds, by suffix."""
        outs = {f".out_cov{suffix}": part for suffix, part in self.out_cov.tensors().items()}
        ins = {f".in_cov{suffix}": part for suffix, part in self.in_cov.tensors().items()}
        return {**outs, **ins}


# What `to_plain` and `from_plain` know, by the name that a saved state gives it.
FORMS: dict[str, Callable[..., Entry | AnyCovariance]] = {
    form.__name__: form
    for form in (
        DenseEntry,
        CodedEntry,
        FactoredEntry,
        KroneckerEntry,
        Covariance,
        LowRankCovariance,
    )
}


def with_tensors(part: Part, change: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Part:
    """An entry (or a covariance) with `change` made to each of its tensors; `made`, by identity,
    keeps shared parts shared across calls.
    """
    if isinstance(part, Tensor):
        changed: Any = change(part)
        return changed
    if not is_dataclass(part) or isinstance(part, type):
        return part
    if id(part) not in made:
        changed = {f.name: with_tensors(getattr(part, f.name), change, made) for f in fields(part)}
        made[id(part)] = replace(part, **changed)
    new: Part = made[id(part)]
    return new


def to_plain(part: Any, made: dict[int, Any]) -> Any:
    """An entry as dictionaries, tensors and plain values, for a saved state.

    What entries share is one dictionary, which torch.save and load keep one.
    """
    if type(part).__name__ not in FORMS:
        return part
    if id(part) not in made:
        made[id(part)] = {
            "form": type(part).__name__,
            **{field.name: to_plain(getattr(part, field.name), made) for field in fields(part)},
        }
    return made[id(part)]


def from_plain(plain: Any, made: dict[int, Any]) -> Any:
    """What `to_plain` was made from."""
    if not isinstance(plain, dict):
        return plain
    if id(plain) not in made:
        made[id(plain)] = FORMS[plain["form"]](
            **{key: from_plain(value, made) for key, value in plain.items() if key != "form"}
        )
    return made[id(plain)]


def tier_of(entries: Mapping[str, Entry]) -> str:
    """The tier that all entries share; 'mixed' where they differ.

    Of ranks the largest is given, since small weights may have less than was asked for.
    """
    tiers = {entry.tier for entry in entries.values()}
    kinds = {tier.partition(":")[0] for tier in tiers}
    if len(kinds) != 1:
        return "mixed"
    return max(tiers, key=lambda tier: int(tier.partition(":")[2] or 0))
