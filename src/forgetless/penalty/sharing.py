"""The pull in several processes: what each keeps of the importance, and what it sees of a weight.

DDP: every process has the whole weight. Each keeps the importance of its shard of the weights and
computes their pull, and the pulls travel: under LoRA all of them in one message, r (in + out)
numbers a weight; in full fine-tuning one weight at a time, as large as its gradient. The result is
that of one process bit for bit.

FSDP2: a process has some rows of each parameter (a DTensor). Under LoRA the two thin factors are
gathered for the pull, one weight at a time, and each process keeps its rows of the result; nothing
of (out, in) is gathered. In full fine-tuning element-wise and factored importance is cut to a
process's rows of W, and the pull is computed where they are: nothing travels. Kronecker importance
is refused there: G U A wants all rows of U.

Memory of importance per process: 1 / N.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)
from forgetless.importance.importance import Importance
from forgetless.model import distributed, shards
from forgetless.model.checkpoint import BaseWeight, KeptWeight
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight, wider


class PullOfWeight(NamedTuple):
    """What a process has of the pull of one weight."""

    weight: TargetWeight
    parts: tuple[Tensor, ...]  # for each of the weight's parameters
    energy: Tensor | float  # zero where another process counts it


@dataclass(frozen=True)
class Sharding:
    """How importance and parameters are spread over the processes; by default they are not.

    Attributes:
        owner: weight -> the process that keeps its importance; None where this process keeps what
            it needs itself.
        sharded: whether parameters are sharded, as under FSDP2.
    """

    owner: Mapping[str, int] | None = None
    sharded: bool = False

    @property
    def spread(self) -> bool:
        """Whether one process alone cannot tell the energy."""
        return self.owner is not None or self.sharded

    def keeps(self, name: str) -> bool:
        """Whether this process keeps the importance of a weight."""
        return self.owner is None or self.owner[name] == distributed.rank()

    def counts_energy(self, weight: TargetWeight) -> bool:
        """Whether this process, which computes the energy of a weight, counts it in the sum."""
        if not self.sharded or self.owner is not None:
            return True
        if isinstance(weight, FullWeight):
            return shards.counts(weight.W)
        return distributed.first()

    def counts_norms(self, parameter: Tensor) -> bool:
        """Whether this process counts a parameter in the norms of pull and gradient."""
        return not self.sharded or shards.counts(parameter)

    def together(self, pulls: Iterator[PullOfWeight]) -> Iterator[PullOfWeight]:
        """The pulls of all weights, together where their importance is spread."""
        if self.owner is None:
            yield from pulls
            return
        waiting: list[PullOfWeight] = []
        for weight, parts, energy in pulls:
            if isinstance(weight, FullWeight):  # as large as the weight, so one travels at a time
                owner = self.owner[weight.name]
                arrived = tuple(distributed.from_owner(part, owner) for part in parts)
                yield PullOfWeight(weight, arrived, energy)
            else:
                waiting.append(PullOfWeight(weight, parts, energy))
        distributed.add_up_all([part for pull in waiting for part in pull.parts])
        yield from waiting

    def sums(self, device: torch.device, energy: float, *norms: float) -> list[float]:
        """Energy and squared norms, each added up over the processes that hold pieces of it."""
        if self.sharded:
            return distributed.add_up_numbers([energy, *norms], device)
        if self.owner is not None:
            return [*distributed.add_up_numbers([energy], device), *norms]
        return [energy, *norms]


def settled(
    before: Sharding, weights: Sequence[TargetWeight], importance: Importance, *, shard: bool
) -> tuple[Sharding, Importance]:
    """(how all is spread by now, what this process keeps of the importance).

    `before` is how it was spread until now. `shard` lets each process keep the importance of its
    shard of the weights. Raises ValueError for what cannot be held under FSDP2.
    """
    sharded = any(shards.is_sharded(p) for weight in weights for p in weight.parameters)
    now = replace(before, sharded=sharded)
    if sharded and not before.sharded:
        for weight in weights:
            check_sharded(weight, importance[weight.name])
    if sharded and isinstance(weights[0], FullWeight):
        return now, importance if before.sharded else cut_to_rows(importance, weights)
    if shard and distributed.running() and before.owner is None:
        owner = owners_of(importance, [weight.name for weight in weights])
        mine = [name for name, process in owner.items() if process == distributed.rank()]
        kept = kept_of(importance, {name: importance[name] for name in mine})
        return replace(now, owner=owner), kept
    return now, importance


def no_pull(weight: TargetWeight) -> tuple[Tensor, ...]:
    """Zeros in place of a pull that another process computes."""
    return tuple(torch.zeros_like(p, dtype=wider(p.dtype)) for p in weight.parameters)


@dataclass(frozen=True, eq=False)
class BaseFrom:
    """The base of some rows of a weight: its row 0 is row `first` of `base`."""

    base: BaseWeight
    first: int

    def read(self, part: tuple[slice, ...]) -> Tensor:
        """Part of the rows, as stored."""
        rows, columns = part
        return self.base.read((slice(rows.start + self.first, rows.stop + self.first), columns))


def seen(weight: TargetWeight) -> TargetWeight:
    """What this process computes with: the weight itself where it is not sharded.

    Under FSDP2, together: a LoRA weight with its factors gathered, or the rows that are here of a
    full weight.
    """
    if isinstance(weight, LowRankWeight):
        if not shards.is_sharded(weight.A):
            return weight
        return replace(weight, A=shards.gathered(weight.A), B=shards.gathered(weight.B))
    if not shards.is_sharded(weight.W):
        return weight
    first, count = shards.rows_here(weight.W)
    base = weight.base if _of_these_rows(weight.base, count) else BaseFrom(weight.base, first)
    return replace(weight, W=shards.local(weight.W), shape=(count, weight.shape[1]), base=base)


def _of_these_rows(base: BaseWeight, count: int) -> bool:
    """Whether a copied base has been cut to the rows that are here."""
    return isinstance(base, KeptWeight) and len(base.tensor) == count


def check_sharded(weight: TargetWeight, entry: Entry) -> None:
    """Raise ValueError for what cannot be held under FSDP2."""
    if not shards.is_sharded(weight.parameters[0]):
        return
    if any(not shards.sharded_by_rows(p) for p in weight.parameters):
        raise ValueError(
            f"'{weight.name}' is sharded other than by rows; use fully_shard as it is, without "
            "tensor parallelism, or DDP"
        )
    if isinstance(weight, FullWeight) and weight.transposed:
        raise ValueError(
            f"'{weight.name}' is stored transposed (Conv1D), so FSDP2 shards its columns; use "
            "LoRA, or DDP"
        )
    if isinstance(weight, FullWeight) and isinstance(entry, KroneckerEntry):
        raise ValueError(
            f"'{weight.name}' has kronecker importance, whose pull on a full weight wants all "
            "rows of it, which FSDP2 spreads; use LoRA, DDP, or element-wise or factored importance"
        )


def current(weight: TargetWeight) -> TargetWeight:
    """The weight with the parameters that its module has now.

    FSDP2 puts others in their place. A base kept as a copy is cut to the rows that are here.
    """
    live = weight.live()
    if (
        isinstance(live, FullWeight)
        and shards.is_sharded(live.W)
        and isinstance(live.base, KeptWeight)
    ):
        first, count = shards.rows_here(live.W)
        if not _of_these_rows(live.base, count):
            return replace(live, base=KeptWeight(live.base.tensor[first : first + count].clone()))
    return live


def slice_here(weight: TargetWeight) -> slice:
    """The rows of a full weight that are here."""
    first, count = shards.rows_here(weight.parameters[0])
    return slice(first, first + count)


def cut_to_rows(importance: Importance, weights: Sequence[TargetWeight]) -> Importance:
    """The importance of the rows of each full weight that are here."""
    rows = {weight.name: slice_here(weight) for weight in weights}
    return kept_of(
        importance, {name: rows_of(importance[name], here) for name, here in rows.items()}, rows
    )


def rows_of(entry: Entry, rows: slice) -> Entry:
    """The importance of some rows."""
    shape = (rows.stop - rows.start, entry.shape[1])
    if isinstance(entry, CodedEntry):
        return CodedEntry(entry.codes[rows].clone(), entry.scale[rows].clone(), shape, entry.tier)
    if isinstance(entry, FactoredEntry):
        return FactoredEntry(entry.row[rows].clone(), entry.col)
    assert isinstance(entry, DenseEntry)
    return DenseEntry(entry.values[rows].clone())


def owners_of(importance: Importance, names: list[str]) -> dict[str, int]:
    """Weight -> the process that keeps its importance.

    Weights that share an input covariance stay together.
    """
    sizes: dict[str, tuple[Any, int]] = {}
    for name in names:
        entry = importance[name]
        group = id(entry.in_cov) if isinstance(entry, KroneckerEntry) else name
        sizes[name] = (group, memory({name: entry}))
    return distributed.owners(sizes)


def kept_of(
    importance: Importance, entries: Mapping[str, Entry], rows: Mapping[str, slice] | None = None
) -> Importance:
    """What a process keeps: `entries` with their anchors; the norms of all weights stay.

    Where entries have been cut to `rows`, their anchors are too.
    """
    info = {**importance.info, "norms": importance.norms()}
    anchors = {}
    for name, (A, B) in importance.anchors.items():
        if name in entries:
            anchors[name] = (A, B[rows[name]] if rows and name in rows else B)
    return Importance(dict(entries), anchors, info)


def memory(entries: Mapping[str, Entry]) -> int:
    """Bytes that entries take, what they share counted once."""
    tensors = {
        tensor.data_ptr(): tensor
        for entry in entries.values()
        for tensor in entry.tensors().values()
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
