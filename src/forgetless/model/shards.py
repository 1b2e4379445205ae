"""Tensors of which a process has some rows, as FSDP2 leaves them (DTensor).

Every function takes plain tensors too, which are whole. What is called "together" is called by
every process, in the same order.

    here = shards.local(parameter)                 # this process's rows, sharing their memory
    first, count = shards.rows_here(parameter)     # and which they are
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from forgetless.model import distributed


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process has only a part of `tensor`, as under FSDP2."""
    # Where torch's module has not been imported, nothing is sharded.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Any) -> Any:
    """`tensor` gathered, together, where it is sharded; for small ones."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Any) -> Any:
    """The part of `tensor` that is here, sharing its memory; all of it where it is not sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def sharded_by_rows(tensor: Any) -> bool:
    """Whether processes have some rows each, as after `fully_shard`."""
    return all(placement.is_replicate() or placement.is_shard(0) for placement in tensor.placements)


def rows_here(tensor: Any) -> tuple[int, int]:
    """(first row, how many) of a tensor sharded by rows; all of them where it is not sharded."""
    if not is_sharded(tensor):
        return 0, tensor.shape[0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return int(offset[0]), int(shape[0])


def rows_like(tensor: Tensor, sharded: Any) -> Tensor:
    """Of a whole tensor the rows that are here of `sharded`.

    It is the tensor itself where `sharded` is not, or where the tensor has been cut already.
    """
    first_row, count = rows_here(sharded)
    return tensor if len(tensor) == count else tensor[first_row : first_row + count]


def counts(tensor: Any) -> bool:
    """Whether what is here of `tensor` counts in a sum over all processes: one of copies does."""
    if not is_sharded(tensor):
        return distributed.first()
    where = tensor.device_mesh.get_coordinate()
    return all(
        at == 0 or not placement.is_replicate()
        for at, placement in zip(where, tensor.placements, strict=True)
    )
