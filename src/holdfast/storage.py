"""Importance files: safetensors, tensors by base weight name `K`, one JSON string in the metadata under `holdfast`. Never pickle.

    K (out, in)                                                 f32, bf16
    K.codes, K.scale                                            u8, u4 (codec.py); tier and shape stand in the metadata under `coded`
    K.row (out, k), K.col (in, k)                               factored
    K.out_cov (out, out), K.in_cov (in, in)                     kronecker
    K.out_cov.vectors (out, k), .values (k,), .floor (scalar)   the same as rank k + constant diagonal; so for in_cov
    K.anchor_A (r, in), K.anchor_B (out, r)                     optional: the adapter at the end of recording, with the scale folded into B

Weights that read the same input share one in_cov: it is stored once, and `shared_in_cov` in the metadata names its place for the others. Written to a temporary
name and renamed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast import codec
from holdfast.importance.container import CodedEntry, DenseEntry, Entry, FactoredEntry, Importance, KroneckerEntry
from holdfast.importance.covariance import AnyCovariance, Covariance, LowRankCovariance
from holdfast.runs import atomic_path, check_output_file

logger = logging.getLogger("holdfast")

FORMAT = 1
SUFFIXES = (
    ".anchor_A",
    ".anchor_B",
    ".codes",
    ".scale",
    ".row",
    ".col",
    *(f".{kind}_cov{part}" for kind in ("out", "in") for part in (".vectors", ".values", ".floor", "")),
)
NOT_OURS = "expected an importance file of `holdfast record`"


def save(importance: Importance, path: str | Path) -> None:
    """Write `importance` atomically. Raises ValueError on non-finite or negative values, naming the weight."""
    from safetensors.torch import save_file

    tensors, shared = _tensors(importance.entries, "the importance")
    for name, (A, B) in importance.anchors.items():
        tensors[f"{name}.anchor_A"], tensors[f"{name}.anchor_B"] = A.contiguous().cpu(), B.contiguous().cpu()
    coded = {name: [entry.tier, *entry.shape] for name, entry in importance.entries.items() if isinstance(entry, CodedEntry)}
    info = {
        **{key: value for key, value in importance.info.items() if key != "path"},
        "format": FORMAT,
        **({"shared_in_cov": shared} if shared else {}),
        **({"coded": coded} if coded else {}),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"holdfast": json.dumps(info, sort_keys=True)})


def load(path: str | Path) -> Importance:
    """Read and check an importance file. Raises ValueError: missing, not safetensors, truncated, foreign, non-finite or negative values."""
    info, tensors = _read(Path(path))
    parts: dict[str, dict[str, Tensor]] = {}  # base weight name -> suffix -> tensor
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        parts.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    shared, coded = info.pop("shared_in_cov", {}), info.pop("coded", {})
    entries, anchors, inputs = {}, {}, {}
    for name, part in parts.items():
        where = f"{path}: '{name}'"
        anchor = [part.pop(suffix, None) for suffix in (".anchor_A", ".anchor_B")]
        if (anchor[0] is None) != (anchor[1] is None):
            raise ValueError(f"{where} has half a recorded adapter; the file is damaged, record again")
        if anchor[0] is not None:
            anchors[name] = (anchor[0], anchor[1])
        if name not in shared:
            entries[name] = _coded(where, part, coded[name]) if name in coded else _entry(where, part, None)
            inputs[name] = getattr(entries[name], "in_cov", None)
    for name, owner in shared.items() if isinstance(shared, dict) else ():
        if name not in parts or inputs.get(owner) is None:
            raise ValueError(f"{path}: '{name}' shares the input covariance of '{owner}', which is not in the file; the file is damaged, record again")
        entries[name] = _entry(f"{path}: '{name}'", parts[name], inputs[owner])
    entries = {name: entries[name] for name in parts}
    _check_anchors(path, entries, anchors)
    if not entries:
        raise ValueError(f"{path} holds no importance; {NOT_OURS}")
    return Importance(entries, anchors, {**info, "path": str(path)})


def _tensors(entries: Mapping[str, Entry], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors of a file, weight -> weight whose in_cov it shares). Raises ValueError on values that are no importance."""
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    shared = {}
    for name, entry in sorted(entries.items()):  # so that the same weight owns a shared covariance whatever the order
        parts = entry.tensors()
        if isinstance(entry, CodedEntry):
            codec.check(f"{where}: '{name}'", entry.codes, entry.scale, entry.shape, entry.tier)
        else:
            _check_parts(f"{where}: '{name}'", parts)
        if isinstance(entry, KroneckerEntry) and (owner := owners.setdefault(id(entry.in_cov), name)) != name:
            shared[name] = owner
            parts = {suffix: tensor for suffix, tensor in parts.items() if not suffix.startswith(".in_cov")}
        tensors.update({name + suffix: tensor.contiguous().cpu() for suffix, tensor in parts.items()})
    return tensors, shared


def _entry(where: str, parts: dict[str, Tensor], in_cov: AnyCovariance | None) -> Entry:
    """The entry that a file's tensors of one weight make up, checked; `in_cov` where it is stored with another weight."""
    _check_parts(where, parts)
    found = set(parts)
    if found == {""}:
        return DenseEntry(parts[""])
    if found == {".row", ".col"}:
        if parts[".row"].shape[1] != parts[".col"].shape[1]:
            raise ValueError(f"{where} has {parts['.row'].shape[1]} rows of factors and {parts['.col'].shape[1]} columns; the file is damaged, record again")
        return FactoredEntry(parts[".row"], parts[".col"])
    out_cov = _covariance(parts, ".out_cov")
    in_cov = in_cov if in_cov is not None else _covariance(parts, ".in_cov")
    if out_cov is None or in_cov is None:
        raise ValueError(
            f"{where} is made of {', '.join(sorted(found)) or 'nothing'}, which is no whole importance; the file is damaged, or of a newer holdfast"
        )
    return KroneckerEntry(out_cov, in_cov)


def _coded(where: str, parts: dict[str, Tensor], listed: Any) -> CodedEntry:
    """The entry in codes; `listed` is [tier, out, in]."""
    if set(parts) != {".codes", ".scale"}:
        raise ValueError(f"{where} lacks its codes or its scale; the file is damaged, convert or record again")
    tier, *shape = listed
    codec.check(where, parts[".codes"], parts[".scale"], shape, tier)
    return CodedEntry(parts[".codes"], parts[".scale"], (shape[0], shape[1]), tier)


def _covariance(parts: dict[str, Tensor], kind: str) -> AnyCovariance | None:
    if kind in parts:
        return Covariance(parts[kind])
    thin = [parts.get(kind + suffix) for suffix in (".vectors", ".values", ".floor")]
    if any(part is None for part in thin):
        return None
    return LowRankCovariance(*thin)  # type: ignore[arg-type]


def _check_parts(where: str, parts: dict[str, Tensor]) -> None:
    """Raise ValueError unless every tensor of one weight has a fitting shape and dtype and can be (part of) importance."""
    for suffix, tensor in parts.items():
        dimensions = 0 if suffix.endswith(".floor") else 1 if suffix.endswith(".values") else 2
        if tensor.ndim != dimensions or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"{where}{suffix} is {tuple(tensor.shape)} {tensor.dtype}, expected {dimensions} dimensions in f32 or bf16; {NOT_OURS}")
        if suffix.endswith("_cov") and tensor.shape[0] != tensor.shape[1]:
            raise ValueError(f"{where}{suffix} is {tuple(tensor.shape)}, expected a square covariance; {NOT_OURS}")
        # Whole covariances and eigenvectors have entries of either sign; a covariance with a negative diagonal has a negative eigenvalue.
        signed = suffix.endswith((".vectors", "_cov"))
        _check_values(where + suffix, tensor, signed)
        if suffix.endswith("_cov") and float(tensor.diagonal().min()) < 0:
            raise ValueError(f"{where}{suffix} has negative variances (down to {float(tensor.diagonal().min()):.3g}); {NOT_OURS}, record again")
        if suffix.endswith("_cov") and float((tensor - tensor.T).abs().max()) > 1e-2 * float(tensor.diagonal().max()):
            raise ValueError(f"{where}{suffix} is not symmetric, as covariances are; the file is damaged, record again")
    for kind in (".out_cov", ".in_cov"):
        if f"{kind}.vectors" in parts and parts[f"{kind}.vectors"].shape[1:] != parts.get(f"{kind}.values", parts[f"{kind}.vectors"]).shape:
            raise ValueError(f"{where}{kind} has {parts[f'{kind}.vectors'].shape[1]} directions and other values; the file is damaged, record again")


def _check_anchors(path: str | Path, entries: Mapping[str, Entry], anchors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (A, B) in anchors.items():
        if name not in entries or A.ndim != 2 or B.ndim != 2 or (B.shape[0], A.shape[1]) != entries[name].shape or A.shape[0] != B.shape[1]:
            raise ValueError(f"{path}: the recorded adapter of '{name}' does not fit its weight; the file is damaged, record again")
        for part in (A, B):
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"{path}: the recorded adapter of '{name}' has non-finite values; record again, or use anchor 'base' with a new file")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"importance file '{path}' does not exist; make one with: holdfast record MODEL --general TEXT --out {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "holdfast" not in metadata:
                raise ValueError(f"{path} is a safetensors file of something else (no 'holdfast' metadata); {NOT_OURS}")
            info = json.loads(metadata["holdfast"])
            if not isinstance(info, dict) or info.get("format") != FORMAT:
                found = info.get("format") if isinstance(info, dict) else type(info).__name__
                raise ValueError(f"{path} has format {found!r}, this holdfast reads {FORMAT}; update holdfast or record again")
            return info, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {NOT_OURS}; copy it or record again") from None


def _check_values(where: str, values: Tensor, signed: bool) -> None:
    low, high = (float(v) for v in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{where} has non-finite importance; record again with a lower learning rate or in f32")
    if low < 0 and not signed:
        raise ValueError(f"{where} has negative importance (down to {low:.3g}); importance is never negative, record again")


def convert(path: str | Path, tier: str, out: str | Path) -> Importance:
    """The importance of one file in another tier, written to `out`. Raises OptionError or ValueError before anything is written."""
    check_output_file(out)
    importance = load(path)
    converted = importance.to_tier(tier)
    save(converted, out)
    before, after = Path(path).stat().st_size, Path(out).stat().st_size
    logger.info("wrote %s: %d weights, tier %s, %.2f MiB (%s: %.2f MiB)", out, len(converted), converted.tier, after / 2**20, importance.tier, before / 2**20)
    return converted
