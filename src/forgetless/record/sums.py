"""What observing recorders add up, by weight: kept in a saved state, and added up over processes.

sums = Sums()                                   # weight -> tensor, added element by element
covariances = CovarianceSums(rank=64)           # weight -> rows^T rows, whole or tracked
covariances.add(name, rows)
covariances.covariance(name, count)             # Covariance or LowRankCovariance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from forgetless.importance.covariance import AnyCovariance, Covariance
from forgetless.model import distributed
from forgetless.record.tracked import Tracked

# Covariances of at least this width are tracked. Below it the whole matrix is as quick.
TRACKED_FROM = 512
# They are tracked along so many directions for each that is kept.
WIDTH_BY_RANK = 2
# And only where they are so many times wider than the rank: then a row costs half or less.
WIDER_BY = 8


class SumsByWeight(Protocol):
    """What a recorder needs of its sums, whatever they are."""

    def state(self) -> dict[str, Tensor]:
        """What a saved state holds."""
        ...

    def restore(self, state: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        """Go on from `state()`, each weight's on its device."""
        ...

    def add_up(self, names: Sequence[str], device: torch.device) -> None:
        """Add up these weights' over all processes, together."""
        ...

    def clear(self) -> None:
        """Let go of everything."""
        ...


class Sums(dict[str, Tensor]):
    """Weight -> a sum."""

    def state(self) -> dict[str, Tensor]:
        return dict(self)

    def restore(self, state: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        for name, tensor in state.items():
            self[name] = tensor.to(devices[name]).clone()

    def add_up(self, names: Sequence[str], device: torch.device) -> None:
        """In place and one weight at a time; a process that saw nothing of a weight gets the
        others' sum.
        """
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.items()}
        for theirs in distributed.collect(mine):
            kinds.update(theirs)
        for name in names:
            if name not in kinds:
                continue
            if name not in self:
                shape, dtype = kinds[name]
                self[name] = torch.zeros(shape, dtype=dtype, device=device)
            distributed.add_up(self[name])


def tracked_directions(n: int, rank: int | None) -> int | None:
    """Along how many directions a covariance (n, n) that will be cut to `rank` is tracked; None
    where it is summed whole.
    """
    if rank is None or n < max(TRACKED_FROM, WIDER_BY * rank):
        return None
    return WIDTH_BY_RANK * rank


def summed_numbers(n: int, rank: int | None) -> int:
    """How many numbers the sum of a covariance (n, n) is."""
    directions = tracked_directions(n, rank)
    return n * n if directions is None else 2 * n * directions


class CovarianceSums:
    """Weight -> the sum of rows^T rows, as a whole matrix or, where it is wide and will be cut to
    `rank`, by its leading directions (tracked.py).
    """

    def __init__(self, rank: int | None = None):
        self.rank = rank
        self.whole = Sums()
        self.tracked: dict[str, Tracked] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.whole or name in self.tracked

    def __bool__(self) -> bool:
        return bool(self.whole or self.tracked)

    def names(self) -> list[str]:
        """The weights of which something was added."""
        return [*self.whole, *self.tracked]

    def add(self, name: str, rows: Tensor) -> None:
        """Add rows (tokens, n)."""
        if name not in self:
            self._begin(name, rows)
        if name in self.tracked:
            self.tracked[name].add(rows)
        else:
            self.whole[name].addmm_(rows.T, rows)

    def _begin(self, name: str, rows: Tensor) -> None:
        """Nothing yet, for rows (tokens, n) like these."""
        n = rows.shape[1]
        directions = tracked_directions(n, self.rank)
        if directions is None:
            self.whole[name] = torch.zeros(n, n, dtype=rows.dtype, device=rows.device)
        else:
            self.tracked[name] = Tracked.start(rows, directions)

    def covariance(self, name: str, count: float) -> AnyCovariance:
        """The sum divided by `count`: whole, or cut to the rank where it was tracked."""
        if name in self.tracked:
            assert self.rank is not None
            return self.tracked[name].cut(self.rank, count)
        return Covariance(self.whole[name] / count)

    def state(self) -> dict[str, Tensor]:
        parts = {
            f"{name}|{key}": tensor
            for name, tracked in self.tracked.items()
            for key, tensor in tracked.tensors().items()
        }
        return {**self.whole, **parts}

    def restore(self, state: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for key, tensor in state.items():
            name, separator, part = key.partition("|")
            if separator:
                parts.setdefault(name, {})[part] = tensor
            else:
                whole[name] = tensor
        self.whole.restore(whole, devices)
        for name, tensors in parts.items():
            self.tracked[name] = Tracked.of(tensors, devices[name])

    def add_up(self, names: Sequence[str], device: torch.device) -> None:
        self.whole.add_up(names, device)
        for name in names:
            parts = distributed.collect(self._on_cpu(name))
            seen = [Tracked.of(part, device) for part in parts if part]
            if seen:
                self.tracked[name] = Tracked.merged(seen)

    def _on_cpu(self, name: str) -> dict[str, Tensor]:
        """What this process has tracked of a weight, to be sent; nothing where it saw none."""
        if name not in self.tracked:
            return {}
        return {key: tensor.cpu() for key, tensor in self.tracked[name].tensors().items()}

    def clear(self) -> None:
        self.whole.clear()
        self.tracked.clear()
