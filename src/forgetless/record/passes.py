"""Passes over the text: which weights each of them sees, and what several processes saw in one.

in_groups(layers, leaders, size, 4)       # [[layer, ...], ...], one group a pass
add_up_sums(sums, names, device)          # in place, over all processes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from forgetless.model import distributed
from forgetless.model.targets import BaseLayer


def in_groups(
    layers: Sequence[BaseLayer],
    leaders: Mapping[str, str],
    size: Callable[[BaseLayer], int],
    groups: int,
) -> list[list[BaseLayer]]:
    """The layers in so many groups of similar size, never more.

    `leaders`: weight -> the first weight that reads the same input; they stay in one group.
    """
    together: dict[str, list[BaseLayer]] = {}
    for layer in layers:
        together.setdefault(leaders.get(layer.name, layer.name), []).append(layer)
    total, before = sum(map(size, layers)), 0
    division: dict[int, list[BaseLayer]] = {}
    for sharing in together.values():
        size_here = sum(map(size, sharing))
        group = int(groups * (before + size_here / 2) / total)  # where their middle lies among all
        division.setdefault(group, []).extend(sharing)
        before += size_here
    return list(division.values())


def add_up_sums(sums: dict[str, Tensor], names: Sequence[str], device: torch.device) -> None:
    """Add up the sums of some weights over all processes, together, in place and one weight at a
    time; a process that saw nothing of a weight gets the others' sum.
    """
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sums.items()}
    for theirs in distributed.collect(mine):
        kinds.update(theirs)
    for name in names:
        if name not in kinds:
            continue
        if name not in sums:
            shape, dtype = kinds[name]
            sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        distributed.add_up(sums[name])
