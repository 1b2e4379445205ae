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
from forgetless.record.seen import add_up_sums
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
        add_up_sums(self, names, device)


def is_tracked(n: int, rank: int | None) -> bool:
    """Whether a covariance (n, n) that will be cut to a rank is tracked and not summed whole."""
    return rank is not None and n >= max(TRACKED_FROM, WIDER_BY * rank)


def summed_numbers(n: int, rank: int | None) -> int:
    """How many numbers the sum of a covariance (n, n) is."""
    return 2 * n * WIDTH_BY_RANK * rank if rank is not None and is_tracked(n, rank) else n * n


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
        n = rows.shape[1]
        if self.rank is not None and name not in self.whole and is_tracked(n, self.rank):
            if name not in self.tracked:
                self.tracked[name] = Tracked.start(rows, WIDTH_BY_RANK * self.rank)
            self.tracked[name].add(rows)
            return
        if name not in self.whole:
            self.whole[name] = torch.zeros(n, n, dtype=rows.dtype, device=rows.device)
        self.whole[name].addmm_(rows.T, rows)

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
        for key, tensor in state.items():
            name, separator, part = key.partition("|")
            if separator:
                parts.setdefault(name, {})[part] = tensor
            else:
                self.whole[name] = tensor.to(devices[name]).clone()
        for name, tensors in parts.items():
            self.tracked[name] = Tracked.of(tensors, devices[name])

    def add_up(self, names: Sequence[str], device: torch.device) -> None:
        add_up_sums(self.whole, names, device)
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
