"""Importance: how much each element of each base weight matters to general ability, with where it came from.

Keyed by the name of the base weight, always (out, in), so one record per base model serves any adapter on those weights and full fine-tuning.

    importance = Importance.load("llama.importance.safetensors")
    importance["model.layers.0.self_attn.q_proj.weight"].dense()   # (out, in) f32
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast import codec

TIERS = {"f32": torch.float32, "bf16": torch.bfloat16}
CODED = tuple(codec.BITS)  # u8, u4


@dataclass(frozen=True)
class DenseEntry:
    """Importance of one weight, element by element; the unit is that of the estimator (path: nats per squared weight)."""

    values: Tensor  # (out, in), f32 or bf16, non-negative

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @property
    def tier(self) -> str:
        return {torch.float32: "f32", torch.bfloat16: "bf16"}.get(self.values.dtype, str(self.values.dtype))

    def dense(self) -> Tensor:
        """(out, in), f32 (f64 stays f64)."""
        return self.values if self.values.dtype == torch.float64 else self.values.float()

    def rows(self, rows: slice) -> Tensor:
        """Some rows, (rows, in), in the stored dtype."""
        return self.values[rows]

    def to(self, device: torch.device) -> DenseEntry:
        """The same on another device."""
        return self if self.values.device == device else DenseEntry(self.values.to(device))

    def energy(self, U: Tensor) -> Tensor:
        """sum_ij Omega_ij U_ij^2, a scalar; U is (out, in)."""
        return (self.dense().to(U) * U * U).sum()

    def norm(self) -> float:
        """Frobenius norm, accumulated in f64."""
        return float(self.values.double().norm())


@dataclass(frozen=True)
class CodedEntry:
    """Importance of one weight in block codes (codec.py); decoded a few rows at a time wherever it is used."""

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

    def to(self, device: torch.device) -> CodedEntry:
        """The same on another device."""
        return self if self.codes.device == device else CodedEntry(self.codes.to(device), self.scale.to(device), self.shape, self.tier)

    def energy(self, U: Tensor) -> Tensor:
        """sum_ij Omega_ij U_ij^2, a scalar; U is (out, in)."""
        return (self.dense().to(U) * U * U).sum()

    def norm(self) -> float:
        """Frobenius norm, accumulated in f64."""
        return codec.norm(self.codes, self.scale, self.shape, self.tier)


Entry = DenseEntry | CodedEntry


@dataclass(frozen=True)
class Importance:
    """Base weight name -> entry, optionally the adapter at the end of recording, and where all of it came from.

    `anchors` maps names to (A, B) with U* = B @ A: (r, in) and (out, r), the scale folded into B. `info` is plain data as stored in the file.
    """

    entries: dict[str, Entry]
    anchors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            from holdfast.config import nearest

            raise KeyError(f"no importance for '{name}' ({len(self.entries)} weights); {nearest(name, self.entries)}")
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def tier(self) -> str:
        tiers = {entry.tier for entry in self.entries.values()}
        return tiers.pop() if len(tiers) == 1 else "mixed"

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each weight's importance; taken from the file where it holds them."""
        stored = self.info.get("norms", {})
        return {name: float(stored[name]) if name in stored else entry.norm() for name, entry in self.entries.items()}

    def to_tier(self, tier: str) -> Importance:
        """The same importance in another number format: f32, bf16, or block codes u8 or u4. The norms in `info` stay those of what was recorded."""
        if tier not in TIERS and tier not in CODED:
            raise ValueError(f"unknown tier '{tier}'; known: {', '.join((*TIERS, *CODED))}")
        entries = {name: entry if entry.tier == tier else _converted(entry, tier) for name, entry in self.entries.items()}
        return Importance(entries, self.anchors, {**self.info, "tier": tier})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a temporary name first, then renamed."""
        from holdfast.storage import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> Importance:
        """Read an importance file. Raises ValueError when it is missing, foreign, truncated or holds non-finite values."""
        from holdfast.storage import load

        return load(path)

    def describe(self) -> str:
        """A table for people: where it came from, norms per weight."""
        from holdfast.storage import describe

        return describe(self)


def _converted(entry: Entry, tier: str) -> Entry:
    if tier in TIERS:
        return DenseEntry(entry.dense().to(TIERS[tier]))
    return CodedEntry(*codec.encode(entry.dense(), tier), entry.shape, tier)
