"""Importance files: safetensors, one tensor per base weight name, one JSON string in the metadata under `holdfast`. Never pickle.

`K` (f32, bf16) or `K.codes` and `K.scale` (u8, u4: codec.py; tier and shape stand in the JSON under `coded`), optionally `K.anchor_A` (r, in) and
`K.anchor_B` (out, r) with the scale folded into B. Written to a temporary name and renamed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast import codec
from holdfast.importance.container import CodedEntry, DenseEntry, Entry, Importance
from holdfast.runs import atomic_path

FORMAT = 1
NOT_OURS = "expected an importance file of `holdfast record`"


def save(importance: Importance, path: str | Path) -> None:
    """Write `importance` atomically. Raises ValueError on non-finite or negative values, naming the weight."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    coded = {}
    for name, entry in importance.entries.items():
        if isinstance(entry, CodedEntry):
            codec.check(name, entry.codes, entry.scale, entry.shape, entry.tier)
            tensors[f"{name}.codes"], tensors[f"{name}.scale"] = entry.codes.contiguous().cpu(), entry.scale.contiguous().cpu()
            coded[name] = [entry.tier, *entry.shape]
        else:
            _check_values(name, entry.values, "the importance")
            tensors[name] = entry.values.contiguous().cpu()
    for name, (A, B) in importance.anchors.items():
        tensors[f"{name}.anchor_A"], tensors[f"{name}.anchor_B"] = A.contiguous().cpu(), B.contiguous().cpu()
    info = {**{key: value for key, value in importance.info.items() if key != "path"}, "format": FORMAT, **({"coded": coded} if coded else {})}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"holdfast": json.dumps(info, sort_keys=True)})


def load(path: str | Path) -> Importance:
    """Read and check an importance file. Raises ValueError: missing, not safetensors, truncated, foreign, non-finite or negative values."""
    info, tensors = _read(Path(path))
    entries: dict[str, Entry] = _coded(info.pop("coded", {}), tensors, path)
    anchors = {}
    for name, tensor in tensors.items():
        if name.endswith(".anchor_A"):
            base = name.removesuffix(".anchor_A")
            if f"{base}.anchor_B" not in tensors:
                raise ValueError(f"{path}: '{name}' has no '{base}.anchor_B'; the file is damaged, record again")
            anchors[base] = (tensor, tensors[f"{base}.anchor_B"])
        elif not name.endswith(".anchor_B"):
            if tensor.ndim != 2 or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise ValueError(f"{path}: '{name}' is {tuple(tensor.shape)} {tensor.dtype}, expected (out, in) in f32 or bf16; {NOT_OURS}")
            _check_values(name, tensor, str(path))
            entries[name] = DenseEntry(tensor)
    for name, (A, B) in anchors.items():
        if name not in entries or A.ndim != 2 or B.ndim != 2 or (B.shape[0], A.shape[1]) != entries[name].shape or A.shape[0] != B.shape[1]:
            raise ValueError(f"{path}: the recorded adapter of '{name}' does not fit its weight; the file is damaged, record again")
        for part in (A, B):
            if not bool(torch.isfinite(part).all()):
                raise ValueError(f"{path}: the recorded adapter of '{name}' has non-finite values; record again, or use anchor 'base' with a new file")
    if not entries:
        raise ValueError(f"{path} holds no importance; {NOT_OURS}")
    return Importance(entries, anchors, {**info, "path": str(path)})


def _coded(listed: Any, tensors: dict[str, Tensor], path: str | Path) -> dict[str, Entry]:
    """The entries in codes, taken out of `tensors`."""
    entries: dict[str, Entry] = {}
    for name, (tier, out, into) in listed.items():
        parts = [tensors.pop(f"{name}.{part}", None) for part in ("codes", "scale")]
        if parts[0] is None or parts[1] is None:
            raise ValueError(f"{path}: '{name}' lacks its codes or its scale; the file is damaged, convert or record again")
        codec.check(name, parts[0], parts[1], (out, into), tier)
        entries[name] = CodedEntry(parts[0], parts[1], (out, into), tier)
    return entries


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


def _check_values(name: str, values: Tensor, where: str) -> None:
    low, high = (float(v) for v in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{where}: '{name}' has non-finite importance; record again with a lower learning rate or in f32")
    if low < 0:
        raise ValueError(f"{where}: '{name}' has negative importance (down to {low:.3g}); importance is never negative, record again")


def describe(importance: Importance) -> str:
    """Where an importance file comes from, and for each weight its shape, norm, mean, largest value and share of zeros."""
    info = importance.info
    model, data = info.get("model", {}), info.get("data", {})
    head = [
        f"estimator    {info.get('estimator', '?')} ({json.dumps(info.get('settings', {}), sort_keys=True)})",
        f"unit         {info.get('unit', '?')}",
        f"tier         {importance.tier}",
        f"base model   {model.get('name', '?')} (fingerprint {str(model.get('fingerprint', '?'))[:12]})",
        f"data         {data.get('source', '?')}: {data.get('documents', '?')} documents, {data.get('tokens', '?')} tokens, "
        f"sha256 {str(data.get('sha256', '?'))[:12]}",
        f"anchor       {'recorded adapter, rank ' + str(next(iter(importance.anchors.values()))[0].shape[0]) if importance.anchors else 'none'}",
        f"weights      {len(importance)} with {sum(e.shape[0] * e.shape[1] for e in importance.entries.values()):,} elements",
    ]
    width = max(len(name) for name in importance)
    rows = [f"{'weight':<{width}}  {'shape':>14}  {'norm':>9}  {'mean':>9}  {'max':>9}  {'zero':>6}"]
    for name, entry in importance.entries.items():
        v = entry.dense()
        shape = f"{entry.shape[0]} x {entry.shape[1]}"
        rows.append(
            f"{name:<{width}}  {shape:>14}  {entry.norm():>9.3g}  {float(v.mean()):>9.3g}  {float(v.max()):>9.3g}  {float((v == 0).float().mean()):>6.1%}"
        )
    return "\n".join([*head, "", *rows])


def describe_file(path: str | Path) -> str:
    """`describe` of the file at `path`, with its size."""
    return f"file         {path} ({Path(path).stat().st_size / 2**20:.2f} MiB)\n" + describe(load(path)) if Path(path).is_file() else describe(load(path))
