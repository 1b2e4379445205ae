"""Several processes that train or record one model: who writes, who owns what, what is added up.

They are started by torchrun or accelerate; `start` joins the group that their environment
describes. In one process everything here does nothing, and costs nothing.

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

    Only the first process talks from here on, except about errors. Raises OptionError for engines
    that the verbs do not run on, and where `device` names one GPU for several processes.
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


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if running() else 1


def rank() -> int:
    """Which process this is, from 0."""
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
    """This process's shard of `items`: every Nth, from its rank on."""
    return list(items[rank() :: world_size()])


def split_batch(batch: int, accumulation: int) -> tuple[int, int]:
    """(sequences per forward pass, forward passes per step) of each process.

    Together the processes make batch * accumulation sequences per step. Raises OptionError where
    these cannot be divided evenly.
    """
    n = world_size()
    # Forward passes are divided first, so that each stays as large as it was.
    fewer_passes = math.gcd(accumulation, n)
    smaller_batch = n // fewer_passes
    if batch % smaller_batch:
        raise OptionError(
            f"--batch-size {batch} x --accumulation {accumulation} sequences per step cannot be "
            f"shared evenly by {n} processes; "
            "let their product be a multiple of the number of processes"
        )
    return batch // smaller_batch, accumulation // fewer_passes


def add_up(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, in place, together."""
    if running():
        dist.all_reduce(tensor)
    return tensor


def add_up_numbers(numbers: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Sums of plain numbers over all processes, in f64, together."""
    if not running():
        return list(numbers)
    tensor = torch.tensor(list(numbers), dtype=torch.float64, device=_travelling(device))
    return add_up(tensor).tolist()


def collect(thing: Any) -> list[Any]:
    """A small plain thing of every process, in the order of their ranks, together."""
    if not running():
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def add_up_all(tensors: Sequence[Tensor]) -> None:
    """The sum of each tensor over all processes, in place, together.

    One message travels for each dtype and device.
    """
    if not running():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        flat = add_up(torch.cat([tensor.flatten() for tensor in group]))
        sums = flat.split([tensor.numel() for tensor in group])
        for tensor, summed in zip(group, sums, strict=True):
            tensor.copy_(summed.view(tensor.shape))


def add_up_at(tensor: Tensor, owner: int) -> None:
    """The sum of `tensor` over all processes, in place at its owner, together.

    Elsewhere the tensor is undefined afterwards.
    """
    if running():
        dist.reduce(tensor, dst=owner)


def from_owner(tensor: Tensor, owner: int) -> Tensor:
    """`tensor` as its owner has it, in place, together."""
    if not running():
        return tensor
    device = _travelling(tensor.device)
    if tensor.device == device and tensor.is_contiguous():
        dist.broadcast(tensor, src=owner)
        return tensor
    moved = tensor.to(device).contiguous()
    dist.broadcast(moved, src=owner)
    return tensor.copy_(moved)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Mean of the gradients over all processes, in place, together, in one message.

    A process without a gradient counts as zero.
    """
    if not running():
        return
    gradients = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    flat = add_up(torch.cat([gradient.flatten() for gradient in gradients])).div_(world_size())
    means = flat.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def owners(
    sizes: Mapping[str, tuple[Hashable, int]], processes: int | None = None
) -> dict[str, int]:
    """Name -> which of `processes` (default: those that there are) keeps it.

    `sizes` is name -> (what it shares memory with, bytes). Those that share memory stay together,
    and each process gets about as much as the others: the largest comes first, and each goes to the
    process that has least.
    """
    groups: dict[Hashable, int] = {}
    for together, amount in sizes.values():
        groups[together] = groups.get(together, 0) + amount
    load = [0] * (processes or world_size())
    where: dict[Hashable, int] = {}
    # The sort is stable, so among equals the order of the model stays.
    for together in sorted(groups, key=lambda key: -groups[key]):
        where[together] = load.index(min(load))
        load[where[together]] += groups[together]
    return {name: where[together] for name, (together, _) in sizes.items()}


def check_same(what: str, value: float, advice: str) -> None:
    """Raise ValueError, together, unless every process has the same number, to a thousandth."""
    values = collect(value)
    if max(values) - min(values) > 1e-3 * max(abs(number) for number in values):
        raise ValueError(
            f"{what} differs between the processes ({min(values):.6g} to {max(values):.6g}), "
            f"expected the same in each; {advice}"
        )


def _travelling(device: torch.device | str) -> torch.device:
    """Where a tensor on `device` must be to travel: on the GPU for nccl."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)
