"""Importance that stays in CPU memory and visits the device one weight at a time.

The pull then takes at most three weights' importance of a GPU's memory: one in use, the next one
arriving, and the one before that is not yet let go.

    # In order; the copy of the next entry is under way while this one is worked with.
    for entry in placed([(entry, device, dtype), ...]): ...

On CUDA the entries lie in pinned memory, and copies run on a stream of their own: the copy of
weight i + 1 starts before the pull of weight i is computed. Cost per step: one transfer of the
importance (u8 for q_proj and v_proj of an 8B model: 0.7 GB). On a CPU nothing is copied and the
results are the same bit for bit. Covariances that consecutive weights share are copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from forgetless.importance.entries import Entry, KroneckerEntry, with_tensors
from forgetless.importance.importance import Importance

Waiting = TypeVar("Waiting")
Started = TypeVar("Started")
Ready = TypeVar("Ready")


def ahead(
    items: Iterable[Waiting], start: Callable[[Waiting], Started], ready: Callable[[Started], Ready]
) -> Iterator[Ready]:
    """ready(start(item)) of each item in order.

    Every item is started before the one in front of it is handed out.
    """
    waiting: list[Started] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) == 2:
            yield ready(waiting.pop(0))
    for last in waiting:
        yield ready(last)


def placed(entries: Iterable[tuple[Entry, torch.device, torch.dtype]]) -> Iterator[Entry]:
    """Each entry on its device in the dtype of the algebra, in order.

    While an entry is worked with, the next one's copy is under way.
    """
    streams: dict[torch.device, torch.cuda.Stream] = {}
    # The copies of the last entry's covariances on each device, which the next one may share.
    copied: dict[torch.device, dict[int, Any]] = {}

    def start(item: tuple[Entry, torch.device, torch.dtype]) -> _Arriving:
        entry, device, dtype = item
        if device.type != "cuda":
            return _Arriving(entry, device, dtype, None)
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        stream = streams[device]
        covariances = _covariances(entry)
        copies = {key: copy for key, copy in copied.get(device, {}).items() if key in covariances}
        with torch.cuda.stream(stream):
            copy = with_tensors(entry, lambda tensor: tensor.to(device, non_blocking=True), copies)
            done = stream.record_event()
        copied[device] = copies
        return _Arriving(copy, device, dtype, done)

    def ready(arriving: _Arriving) -> Entry:
        if arriving.done is not None:
            current = torch.cuda.current_stream(arriving.device)
            current.wait_event(arriving.done)
            with_tensors(arriving.entry, lambda tensor: _used_on(tensor, current), {})
        return arriving.entry.to(arriving.device, arriving.dtype, {})

    return ahead(entries, start, ready)


class _Arriving(NamedTuple):
    """An entry whose copy has been started; `done` tells when it is there, None: at once."""

    entry: Entry
    device: torch.device
    dtype: torch.dtype
    done: torch.cuda.Event | None


def _covariances(entry: Entry) -> set[int]:
    """Identities of the covariances of an entry, which other entries may have too."""
    if not isinstance(entry, KroneckerEntry):
        return set()
    return {id(entry.out_cov), id(entry.in_cov)}


def _used_on(tensor: Tensor, stream: Any) -> Tensor:
    """Tell the allocator that `stream`, which did not copy the tensor, reads it.

    Its memory is not given away before that stream is done with it.
    """
    tensor.record_stream(stream)
    return tensor


def in_cpu_memory(importance: Importance, names: Iterable[str], pin: bool) -> Importance:
    """The importance of `names` in CPU memory.

    With `pin` it is a pinned copy, from which a GPU copies beside its work.
    """
    moved: dict[int, Any] = {}  # covariances that entries share stay shared

    def move(tensor: Tensor) -> Tensor:
        return tensor.cpu().pin_memory() if pin else tensor.cpu()

    entries = {name: with_tensors(importance[name], move, moved) for name in names}
    return Importance(entries, importance.anchors, importance.info)
