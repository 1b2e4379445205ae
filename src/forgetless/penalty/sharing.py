"""The pull in several processes: which of them keeps what of the importance, and what each sees of
a weight.

DDP: every process has the whole weight. Each keeps the importance of its share of the weights,
computes their pull, and the pulls travel: under LoRA all in one message, r (in + out) numbers a
weight; in full fine-tuning one weight at a time, as large as its gradient. The result is that of
one process bit for bit.

FSDP2: a process has some rows of each parameter (a DTensor). Under LoRA the two thin factors are
gathered for the pull, one weight at a time, and each process keeps its rows of the result; nothing
of (out, in) is gathered. In full fine-tuning element-wise and factored importance is cut to a
process's rows of W, and the pull is computed where they are: nothing travels. Kronecker importance
is refused there: G U A wants all rows of U.

Memory of importance per process: 1 / N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.checkpoint import Base, KeptWeight
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight


@dataclass(frozen=True, eq=False)
class BaseFrom:
    """The base of some rows of a weight: row 0 of it is row `first` of `base`."""

    base: Base
    first: int

    def read(self, part: tuple[slice, ...]) -> Tensor:
        """Part of the rows, as stored."""
        rows, columns = part
        return self.base.read((slice(rows.start + self.first, rows.stop + self.first), columns))


def seen(weight: TargetWeight) -> TargetWeight:
    """What this process computes with: the weight itself, or under FSDP2, together, LoRA factors
    gathered, of a full weight the rows that are here.
    """
    if isinstance(weight, LowRankWeight):
        if not distributed.is_sharded(weight.A):
            return weight
        return replace(weight, A=distributed.whole(weight.A), B=distributed.whole(weight.B))
    if not distributed.is_sharded(weight.W):
        return weight
    first, count = distributed.rows_here(weight.W)
    base = weight.base if _of_these_rows(weight.base, count) else BaseFrom(weight.base, first)
    return replace(weight, W=distributed.local(weight.W), shape=(count, weight.shape[1]), base=base)


def _of_these_rows(base: Any, count: int) -> bool:
    return isinstance(base, KeptWeight) and len(base.tensor) == count


def check_sharded(weight: TargetWeight, entry: Entry) -> None:
    """Raise ValueError for what cannot be held under FSDP2."""
    if not distributed.is_sharded(weight.parameters[0]):
        return
    if any(not distributed.sharded_by_rows(p) for p in weight.parameters):
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
            "rows of it, which FSDP2 spreads; use LoRA, "
            "DDP, or element-wise or factored importance"
        )


def current(weight: TargetWeight) -> TargetWeight:
    """The weight with the parameters that its module has now:

    FSDP2 puts others in their place. A base kept as a copy is cut to the rows that are here.
    """
    live = weight.live()
    if (
        isinstance(live, FullWeight)
        and distributed.is_sharded(live.W)
        and isinstance(live.base, KeptWeight)
    ):
        first, count = distributed.rows_here(live.W)
        if not _of_these_rows(live.base, count):
            return replace(live, base=KeptWeight(live.base.tensor[first : first + count].clone()))
    return live


def rows_here(weight: TargetWeight) -> slice:
    """The rows of a full weight that are here."""
    first, count = distributed.rows_here(weight.parameters[0])
    return slice(first, first + count)


def rows_of(entry: Entry, rows: slice) -> Entry:
    """The importance of some rows."""
    shape = (rows.stop - rows.start, entry.shape[1])
    if isinstance(entry, CodedEntry):
        return CodedEntry(entry.codes[rows].clone(), entry.scale[rows].clone(), shape, entry.tier)
    if isinstance(entry, FactoredEntry):
        return FactoredEntry(entry.row[rows].clone(), entry.col)
    assert isinstance(entry, DenseEntry)
    return DenseEntry(entry.values[rows].clone())


def owners(importance: Importance, names: list[str]) -> dict[str, int]:
    """Weight -> the process that keeps its importance: those that share an input covariance stay
    together.
    """
    sizes: dict[str, tuple[Any, int]] = {}
    for name in names:
        entry = importance[name]
        sizes[name] = (
            id(entry.in_cov) if isinstance(entry, KroneckerEntry) else name,
            memory({name: entry}),
        )
    return distributed.owners(sizes)


def part(
    importance: Importance, entries: Mapping[str, Entry], rows: Mapping[str, slice] | None = None
) -> Importance:
    """What a process keeps:

    `entries` with their anchors, of these some rows where entries have been cut; the norms of all
    weights stay.
    """
    info = {**importance.info, "norms": importance.norms()}
    every = slice(None)
    anchors = {
        name: (A, B[(rows or {}).get(name, every)])
        for name, (A, B) in importance.anchors.items()
        if name in entries
    }
    return Importance(dict(entries), anchors, info)


def memory(entries: Mapping[str, Entry]) -> int:
    """Bytes that entries take, what they share counted once."""
    tensors = {
        tensor.data_ptr(): tensor
        for entry in entries.values()
        for tensor in entry.tensors().values()
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
