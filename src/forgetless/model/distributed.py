"""Several processes that train or record one model: who writes, who owns what, and the few things
that are added up between them.

Started by torchrun or accelerate; `start` joins the group that their environment describes.
Everything here does nothing, and costs nothing, in one process.

    distributed.start("auto")                    # before the model is loaded
    mine = distributed.shard(batches)            # every Nth
    distributed.add_up(sums)                     # in place, over all processes
    owners = distributed.owners(sizes)           # weight -> the process that keeps its importance
    if distributed.first(): write(...)

What is called "together" is called by every process, in the same order: a process that is left out
makes the others wait for ever.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from forgetless.errors import OptionError
from forgetless.model import engine

Item = TypeVar("Item")


def launched() -> bool:
    """Whether a launcher started more than one process, joined or not."""
    return (
        int(os.environ.get("WORLD_SIZE") or 1) > 1
        and "RANK" in os.environ
        and "MASTER_ADDR" in os.environ
    )


def start(device: str = "auto") -> None:
    """Join the processes that a launcher started: gloo on the CPU, nccl on GPUs, one each.

    Only the first one talks from here on, except about errors.

    Raises OptionError for engines that the verbs do not run on, and where `device` names one GPU
    for several processes.
    """
    engine.check_launch()
    if not launched():
        return
    if device.startswith("cuda:"):
        raise OptionError(
            f"--device {device} names one GPU, found {os.environ['WORLD_SIZE']} processes, each "
            "with its own; use --device cuda, or one process"
        )
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if not first():
        logging.getLogger("forgetless").setLevel(logging.ERROR)


def running() -> bool:
    """Whether this is one of several processes that have joined."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if running() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if running() else 0


def first() -> bool:
    """Whether this is the process that writes and talks."""
    return rank() == 0


def silent() -> bool:
    """Whether progress bars are left out: no terminal to show them on, or not the first process."""
    return not (sys.stderr.isatty() and first())


def barrier() -> None:
    """Wait, together, until every process is here."""
    if running():
        dist.barrier()


def shard(items: Sequence[Item]) -> list[Item]:
    """This process's part of `items`: every Nth, from its rank on."""
    return list(items[rank() :: size()])


def split_batch(batch: int, accumulation: int) -> tuple[int, int]:
    """(sequences per forward pass, forward passes per step) of each process, so that together they
    make batch * accumulation sequences per step.

    Raises OptionError where these cannot be divided evenly.
    """
    n = size()
    shared = math.gcd(
        accumulation, n
    )  # forward passes are divided first, so that each stays as large as it was
    if batch % (n // shared):
        raise OptionError(
            f"--batch-size {batch} x --accumulation {accumulation} sequences per step cannot be "
            f"shared evenly by {n} processes; "
            "let their product be a multiple of the number of processes"
        )
    return batch // (n // shared), accumulation // shared


def add_up(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, in place, together."""
    if running():
        dist.all_reduce(tensor)
    return tensor


def add_up_numbers(numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Sums of plain numbers over all processes, in f64, together."""
    if not running():
        return list(numbers)
    return add_up(torch.tensor(list(numbers), dtype=torch.float64, device=_place(device))).tolist()


def collect(thing: Any) -> list[Any]:
    """A small plain thing of every process, in the order of their ranks, together."""
    if not running():
        return [thing]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, thing)
    return found


def add_up_all(tensors: Sequence[Tensor]) -> None:
    """The sum of each tensor over all processes, in place, together; one message for each dtype and
    device.
    """
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values() if running() else ():
        flat = add_up(torch.cat([tensor.flatten() for tensor in group]))
        for tensor, summed in zip(
            group, flat.split([tensor.numel() for tensor in group]), strict=True
        ):
            tensor.copy_(summed.view(tensor.shape))


def add_up_at(tensor: Tensor, owner: int) -> None:
    """The sum of `tensor` over all processes, in place at its owner, together; elsewhere it is
    undefined afterwards.
    """
    if running():
        dist.reduce(tensor, dst=owner)


def from_owner(tensor: Tensor, owner: int) -> Tensor:
    """`tensor` as its owner has it, in place, together."""
    if running():
        place = _place(tensor.device)
        moved = (
            tensor
            if tensor.device == place and tensor.is_contiguous()
            else tensor.to(place).contiguous()
        )
        dist.broadcast(moved, src=owner)
        if moved is not tensor:
            tensor.copy_(moved)
    return tensor


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean of the gradients over all processes, together, in one message; a process without a
    gradient counts as zero.
    """
    if not running():
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = add_up(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])).div_(
        size()
    )
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        assert p.grad is not None
        p.grad.copy_(part.view_as(p.grad))


def owners(
    sizes: Mapping[str, tuple[Hashable, int]], processes: int | None = None
) -> dict[str, int]:
    """Name -> which of `processes` (default: those that there are) keeps it.

    `sizes`: name -> (what it shares memory with, bytes); those that share stay together, and each
    process gets about as much as the others: the largest first, each to who has least.
    """
    groups: dict[Hashable, int] = {}
    for together, amount in sizes.values():
        groups[together] = groups.get(together, 0) + amount
    load = [0] * (processes or size())
    where: dict[Hashable, int] = {}
    for together in sorted(
        groups, key=lambda key: -groups[key]
    ):  # stable: the order of the model among equals
        where[together] = load.index(min(load))
        load[where[together]] += groups[together]
    return {name: where[together] for name, (together, _) in sizes.items()}


def check_same(what: str, value: float, advice: str) -> None:
    """Raise ValueError, together, unless every process has the same number (to rounding)."""
    found = collect(value)
    if max(found) - min(found) > 1e-3 * max(abs(one) for one in found):
        raise ValueError(
            f"{what} differs between the processes ({min(found):.6g} to {max(found):.6g}), "
            f"expected the same in each; {advice}"
        )


def _place(device: torch.device | str) -> torch.device:
    """Where tensors must be to travel: on the GPU for nccl."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)
