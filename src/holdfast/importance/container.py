"""Importance: how much each element of each base weight matters to general ability, with where it came from.

Keyed by the name of the base weight, always (out, in), so one record per base model serves any adapter on those weights and full fine-tuning.

    importance = Importance.load("llama.importance.safetensors")
    importance["model.layers.0.self_attn.q_proj.weight"].dense()   # (out, in) f32
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.importance.calibration import Calibration
from holdfast.importance.entries import CodedEntry, DenseEntry, Entry, FactoredEntry, KroneckerEntry
from holdfast.importance.fidelity import energy_errors
from holdfast.importance.tiers import converted

__all__ = ["Calibration", "CodedEntry", "DenseEntry", "Entry", "FactoredEntry", "Importance", "KroneckerEntry"]
logger = logging.getLogger("holdfast")
BY_ELEMENT = {"f32", "bf16", "u8", "u4"}  # tiers that have the same energy, to the precision of their codes: a few per cent


@dataclass(frozen=True)
class Importance:
    """Base weight name -> entry, optionally the adapter at the end of recording, and where all of it came from.

    `anchors` maps names to (A, B) with U* = B @ A: (r, in) and (out, r), the scale folded into B. `info` is plain data as stored in the file. `calibration`
    says what a unit of this energy costs; it goes where the energy changes.
    """

    entries: Mapping[str, Entry]
    anchors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __getitem__(self, name: str) -> Entry:
        if name not in self.entries:
            from holdfast.options import nearest

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
        kinds = {tier.partition(":")[0] for tier in tiers}
        # Small weights may have less than the rank asked for.
        return max(tiers, key=lambda tier: int(tier.partition(":")[2] or 0)) if len(kinds) == 1 else "mixed"

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each weight's importance; taken from the file where it holds them."""
        stored = self.info.get("norms", {})
        return {name: float(stored[name]) if name in stored else entry.norm() for name, entry in self.entries.items()}

    def to_tier(self, tier: str) -> Importance:
        """The same importance in another form (see `holdfast.importance.tiers`): f32, bf16, u8, u4, factored, factored:4, kronecker:16.

        What it does to the energy of each weight (see `holdfast.importance.fidelity`) goes into `info`, for `holdfast inspect`.
        Raises OptionError for an unknown tier, ValueError where this importance cannot be brought there.
        """
        entries = converted(dict(self.entries), tier)
        errors = {name: energy_errors(self.entries[name], entry) for name, entry in entries.items()}
        norms = {"norms": {name: entry.norm() for name, entry in entries.items()}} if "norms" in self.info else {}
        calibration = self.calibration if tier == self.tier or {self.tier, tier} <= BY_ELEMENT else None  # other forms have another energy
        if calibration is not self.calibration:
            logger.warning("the calibration was measured with tier %s, and is left out of tier %s: record with --tier %s --calibrate", self.tier, tier, tier)
        return Importance(entries, self.anchors, {**self.info, **norms, "energy_error": {"against": self.tier, "weights": errors}, "tier": tier}, calibration)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a temporary name first, then renamed."""
        from holdfast.storage import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> Importance:
        """Read an importance file. Raises ValueError when it is missing, foreign, truncated or holds non-finite values."""
        from holdfast.storage import load

        return load(path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `importance.safetensors` and a model card into a folder, as they go to the Hub; paths of this machine are left out."""
        from holdfast.hub import save_pretrained

        save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None,
                    commit_message: str = "Upload importance", create_pr: bool = False) -> str:  # fmt: skip
        """Upload file and card to a Hub repository, made where it is not there; returns the address. Raises ValueError where the Hub refuses."""
        from holdfast.hub import push_importance

        return push_importance(self, repo_id, private=private, token=token, revision=revision, commit_message=commit_message, create_pr=create_pr)

    @staticmethod
    def from_pretrained(name: str | Path, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | Path | None = None,
                        local_files_only: bool = False) -> Importance:  # fmt: skip
        """Read importance from a file, a folder of `save_pretrained` or a Hub repository; what exists locally comes first. Raises ValueError as `load`."""
        from holdfast.hub import importance_path

        return Importance.load(importance_path(name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only))

    def describe(self) -> str:
        """A table for people: where it came from, norms and a histogram per weight."""
        from holdfast.inspection import describe

        return describe(self)
