"""The base weights of full fine-tuning, read from the checkpoint's safetensors files.

U = W - W(base) needs W(base) in every step, and a copy would double the memory of the weights. A
model loaded from a local folder or from the hub's cache still has it on disk: `stored_weights`
finds file and key of each weight, whatever transformers renamed while loading, and hands out a
reader only where the file's values, cast to the parameter's dtype, are the live ones bit for bit.
Files are memory-mapped and read a few rows at a time, so the system's page cache is all the memory
that this takes, and it may be taken back. A weight that is not found stays as a copy (`KeptWeight`,
the twin).

    # {name: StoredWeight}; names that are missing need a copy
    stored_weights(model, {"model.layers.0.mlp.up_proj.weight": W})
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Elements of a weight that are compared at a time: 16 MiB in f32.
COMPARED_AT_A_TIME = 1 << 22


class BaseWeight(Protocol):
    """A weight as it was, of which parts can be read."""

    def read(self, part: tuple[slice, ...]) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A weight as it was: a copy in memory."""

    tensor: Tensor

    def read(self, part: tuple[slice, ...]) -> Tensor:
        """Part of the weight, as stored."""
        return self.tensor[part]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as it was, in a memory-mapped safetensors file.

    Nothing of it is in memory but what `read` returns.
    """

    path: Path
    key: str
    file: Any  # safetensors' handle, one for all weights of a file
    stamp: tuple[int, ...]  # of the file when it was opened

    def read(self, part: tuple[slice, ...]) -> Tensor:
        """Part of the weight, as stored.

        Raises ValueError where the file was written over: reading on would be a fault, or another
        base.
        """
        now = _stamp(self.path)
        if now != self.stamp and now[0] == self.stamp[0]:
            raise ValueError(
                f"'{self.path}' was written over while the weights are held towards what was in "
                "it; save to another folder than the base model's"
            )
        return self.file.get_slice(self.key)[part]


def stored_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, StoredWeight]:
    """Readers of those of `weights` that stand in the model's checkpoint exactly as they are now.

    `weights` go by their names in the bare `model`.
    """
    readers: dict[str, StoredWeight] = {}
    aliases = _aliases(model)
    files = [path for folder in checkpoint_folders(model) for path in _weight_files(folder)]
    for path in files:
        if len(readers) == len(weights):
            break
        stamp = _stamp(path)
        file = _safetensors_handle(path)
        for key, name in _renamed(model, sorted(file.keys())):
            reader = StoredWeight(path, key, file, stamp)
            for target in aliases.get(name, (name,)):
                if target in weights and target not in readers and _same(reader, weights[target]):
                    readers[target] = reader
    return readers


def checkpoint_folders(model: nn.Module) -> list[Path]:
    """Where `model` may have been loaded from; none where that is unknown.

    It is a local folder, or each snapshot of its name in the hub's cache, the newest first.
    transformers 5.23 doesn't tell which snapshot it was. Values are compared before they are
    trusted, so a wrong one costs a glance.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return []
    if Path(name).is_dir():
        return [Path(name)]
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / ("models--" + name.replace("/", "--")) / "snapshots"
    return sorted(snapshots.glob("*"), key=lambda folder: folder.stat().st_mtime, reverse=True)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, as from_pretrained looks for them.

    There is one file, or an index with its shards.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / shard for shard in shards if (folder / shard).is_file()]


def _safetensors_handle(path: Path) -> Any:
    """safetensors' handle of a file."""
    from safetensors import safe_open

    return safe_open(str(path), framework="pt")


def _stamp(path: Path) -> tuple[int, ...]:
    """(inode, size, time of change) of a file; (0,) where nothing is there any more.

    A file that was replaced has another inode, and the old one stays mapped.
    """
    try:
        status = os.stat(path)
    except OSError:
        return (0,)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _renamed(model: nn.Module, keys: list[str]) -> Iterator[tuple[str, str]]:
    """(key in the file, name in the model), as transformers renames while loading.

    Keys whose tensors it merges or splits are left out.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = list(getattr(model, "_weight_conversions", None) or [])
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    for key in keys:
        name, converted = rename_source_key(
            key, renamings, converters, getattr(model, "base_model_prefix", None) or None, state
        )
        if converted is None:
            yield key, name


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of a parameter -> all its names: a tied one is stored under one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


def _same(stored: StoredWeight, live: Tensor) -> bool:
    """Whether the file's values in the live dtype are the live ones bit for bit.

    They are compared a few rows at a time.
    """
    shape = stored.file.get_slice(stored.key).get_shape()
    if tuple(shape) != tuple(live.shape) or live.ndim != 2:
        return False
    rows = max(1, COMPARED_AT_A_TIME // max(live.shape[1], 1))
    for first in range(0, live.shape[0], rows):
        part = (slice(first, first + rows), slice(None))
        if not torch.equal(stored.read(part).to(live.dtype), live.detach()[part].cpu()):
            return False
    return True
