"""Importance that stays in CPU memory and visits the device one weight at a time: what the pull
takes of a GPU's memory is at most three weights' importance (one in use, the next one arriving, the
one before not yet let go).

    for entry in placed([(entry, device, dtype), ...]): ...     # in order; the copy of the next one
        is under way while this one is worked with

On CUDA the entries lie in pinned memory, and copies run on a stream of their own: the copy of
weight i + 1 starts before the pull of weight i is computed. Cost per step: one transfer of the
importance (u8 for q_proj and v_proj of an 8B model: 0.7 GB). On a CPU nothing is copied and the
results are the same bit for bit. Covariances that consecutive weights share are copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from forgetless.importance.entries import Entry, with_tensors
from forgetless.importance.importance import Importance

Item = TypeVar("Item")
Started = TypeVar("Started")
Ready = TypeVar("Ready")


def ahead(
    items: Iterable[Item], start: Callable[[Item], Started], ready: Callable[[Started], Ready]
) -> Iterator[Ready]:
    """ready(start(item)) of each item in order, every item started before the one in front of it is
    handed out.
    """
    waiting: list[Started] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) == 2:
            yield ready(waiting.pop(0))
    for last in waiting:
        yield ready(last)


def placed(entries: Iterable[tuple[Entry, torch.device, torch.dtype]]) -> Iterator[Entry]:
    """Each entry on its device in the dtype of the algebra, in order, the next one's copy under
    way.
    """
    streams: dict[torch.device, Any] = {}
    made: dict[
        torch.device, dict[int, Any]
    ] = {}  # what the last entry on each device was made of: the parts that the next one may share

    def start(
        item: tuple[Entry, torch.device, torch.dtype],
    ) -> tuple[Entry, torch.device, torch.dtype, Any]:
        entry, device, dtype = item
        if device.type != "cuda":
            return entry, device, dtype, None
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        stream = streams[device]
        mine: dict[int, Any] = {
            key: part for key, part in made.get(device, {}).items() if key in _parts(entry)
        }
        with torch.cuda.stream(stream):
            copy = with_tensors(entry, lambda tensor: tensor.to(device, non_blocking=True), mine)
            done = stream.record_event()
        made[device] = mine
        return copy, device, dtype, done

    def ready(started: tuple[Entry, torch.device, torch.dtype, Any]) -> Entry:
        entry, device, dtype, done = started
        if done is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            with_tensors(entry, lambda tensor: _used_on(tensor, current), {})
        return entry.to(device, dtype, {})

    return ahead(entries, start, ready)


def _parts(entry: Entry) -> set[int]:
    """Identities of the covariances of an entry."""
    return {
        id(part)
        for part in (getattr(entry, "out_cov", None), getattr(entry, "in_cov", None))
        if part is not None
    }


def _used_on(tensor: Tensor, stream: Any) -> Tensor:
    """Tell the allocator that another stream than the one that copied it reads the tensor, so that
    its memory is not given away too soon.
    """
    tensor.record_stream(stream)
    return tensor


def in_cpu_memory(importance: Importance, names: Iterable[str], pin: bool) -> Importance:
    """The importance of `names` in CPU memory; pinned, which is a copy, where copies to a GPU are
    to run beside its work.
    """
    made: dict[int, Any] = {}
    move = lambda tensor: tensor.cpu().pin_memory() if pin else tensor.cpu()
    return Importance(
        {name: with_tensors(importance[name], move, made) for name in names},
        importance.anchors,
        importance.info,
    )
