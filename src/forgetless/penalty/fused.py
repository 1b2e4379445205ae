"""The pull of one LoRA weight in one Triton kernel: importance and factors are read once.

    D = s B A - B0 A0       P = Omega * D       energy = sum P * D
    pull on B = 2 k s P A^T                     pull on A = 2 k s B^T P

D = U - U* exists only as tiles in registers. Importance comes as codes (u8, u4) or as f32 or bf16
numbers, in any shape; ranks are padded to a power of two, at least 16. Sums are in f32, and
products in full f32 (no tf32). The result is the same at every call: each program writes partial
sums to places of its own, and these are added in a fixed order.

Cost per weight: the importance of out * in elements (1.016 bytes each in u8) is read once, each
element takes 6 r operations, and partial sums take about out * in * max(16, r) / 16 bytes, which
live in the GPU's cache. Twins: dense.py, and tiled.py, which does the same on any device.

On a CPU the kernel runs only in Triton's interpreter (TRITON_INTERPRET=1), to check what it
computes; that says nothing about its speed.

    ok, why = fused.available(A.device)
    pull_A, pull_B, energy = fused.pull(A, B, scale, codes, block_scale, "u8", anchor=None, k=0.1)
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from forgetless.importance import codec

# The largest rank of the factors: wider ones would not fit into a program's registers.
MAX_RANK = 128
# The tiers that the kernel reads, and the dtype of their numbers or codes.
KERNEL_TIERS = {"f32": torch.float32, "bf16": torch.bfloat16, "u8": torch.uint8, "u4": torch.uint8}
# About how many programs run, which keeps every multiprocessor busy.
PROGRAMS = 512
# The warps of a program: at 4, ptxas spills registers on sm_90.
WARPS = 8


def available(device: torch.device | str) -> tuple[bool, str]:
    """(whether the kernel is to be used on `device`, why or why not)."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    if device.type != "cuda":
        return False, f"the kernel needs a GPU, found {device.type}"
    if interpreted():
        return False, "TRITON_INTERPRET is set: Triton's interpreter checks results and is slow"
    return True, "Triton on a GPU"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def pull(
    A: Tensor,
    B: Tensor,
    scale: float,
    omega: Tensor,
    block_scale: Tensor | None,
    tier: str,
    anchor: tuple[Tensor, Tensor] | None,
    k: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A (r, in), pull on B (out, r), energy), in f32, for U = scale * B @ A.

    U is held towards B0 @ A0 with anchor = (A0, B0), or towards zero. `omega` holds codes as in
    importance/codec.py with their `block_scale`, or (out, in) numbers in f32 or bf16 without one.
    Factors are in f32, bf16 or f16. Raises ValueError for what the kernel does not do: f64, ranks
    above 128, tensors on a CPU outside of the interpreter.
    """
    _check_kernel_reads(A, B, omega, block_scale, tier)
    _check_kernel_takes(A, B, anchor)
    partial_A, partial_B, partial_energy = _launch(A, B, scale, omega, block_scale, tier, anchor)
    rank = A.shape[0]
    factor = 2 * k * scale
    return (
        partial_A.sum(0)[:rank].mul_(factor),
        partial_B.sum(0)[:, :rank].mul(factor),
        partial_energy.sum(),
    )


def _launch(
    A: Tensor,
    B: Tensor,
    scale: float,
    omega: Tensor,
    block_scale: Tensor | None,
    tier: str,
    anchor: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel; its partial sums, as it describes them."""
    from forgetless.penalty.kernel import pull_kernel  # Triton is not installed everywhere

    (rank, into), out = A.shape, B.shape[0]
    A0, B0 = (A, B) if anchor is None else anchor
    padded, padded_anchor = _padded_rank(rank), _padded_rank(A0.shape[0])
    grid = _grid(out, into, max(padded, padded_anchor))
    partial_A = A.new_empty((grid.row_tiles, padded, into), dtype=torch.float32)
    partial_B = A.new_empty((grid.groups, out, padded), dtype=torch.float32)
    partial_energy = A.new_empty((grid.row_tiles, grid.groups), dtype=torch.float32)
    omega = omega.contiguous()
    pull_kernel[(grid.row_tiles, grid.groups)](
        omega,
        omega if block_scale is None else block_scale.contiguous(),
        A.contiguous(),
        B.contiguous(),
        A0.contiguous(),
        B0.contiguous(),
        partial_A,
        partial_B,
        partial_energy,
        out,
        into,
        omega.shape[1],
        rank,
        A0.shape[0],
        float(scale),
        grid.steps,
        TIER=tier,
        CODED=tier in codec.BITS,
        BLOCK=codec.BLOCK,
        ANCHORED=anchor is not None,
        BM=grid.side,
        BN=grid.side,
        R=padded,
        R0=padded_anchor,
        PRECISION="ieee",
        num_warps=WARPS,
    )
    return partial_A, partial_B, partial_energy


class _Grid(NamedTuple):
    """The programs of one launch: each goes through some column tiles of one row of tiles."""

    side: int  # rows and columns of a tile
    row_tiles: int
    groups: int  # of column tiles
    steps: int  # column tiles of one group


def _grid(out: int, into: int, padded: int) -> _Grid:
    """About PROGRAMS programs for a weight (out, in); `padded`: the larger padded rank."""
    side = _side(padded)
    row_tiles, column_tiles = -(-out // side), -(-into // side)
    steps = max(1, column_tiles * row_tiles // PROGRAMS)
    return _Grid(side, row_tiles, -(-column_tiles // steps), steps)


def _padded_rank(rank: int) -> int:
    """The rank that the kernel works with: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _side(padded: int) -> int:
    """Rows and columns of a tile: as many as fit into registers beside factors of this rank.

    Both divide the block of the code.
    """
    return 64 if padded <= 32 else 32


def _check_kernel_reads(
    A: Tensor, B: Tensor, omega: Tensor, block_scale: Tensor | None, tier: str
) -> None:
    """Raise ValueError for importance that the kernel does not read, or of another weight."""
    if tier not in KERNEL_TIERS or omega.dtype != KERNEL_TIERS[tier]:
        raise ValueError(
            f"the kernel reads {', '.join(KERNEL_TIERS)}, found tier '{tier}' as {omega.dtype}; "
            "use the dense pull, or convert the importance"
        )
    out, into = B.shape[0], A.shape[1]
    if tier in codec.BITS:
        assert block_scale is not None
        codec.check_codes("importance", omega, block_scale, (out, into), tier)
    elif tuple(omega.shape) != (out, into):
        raise ValueError(
            f"importance is {tuple(omega.shape)} for factors of ({out}, {into}); record again on "
            "this model"
        )


def _check_kernel_takes(A: Tensor, B: Tensor, anchor: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError for factors that the kernel does not take."""
    factors = (A, B) if anchor is None else (A, B, *anchor)
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) for t in factors):
        raise ValueError(
            "the kernel works on f32, bf16 or f16 factors, found "
            f"{', '.join(str(t.dtype) for t in factors)}; use the dense pull"
        )
    ranks = [A.shape[0]] if anchor is None else [A.shape[0], anchor[0].shape[0]]
    if max(ranks) > MAX_RANK:
        raise ValueError(
            f"the kernel holds ranks up to {MAX_RANK}, found {max(ranks)}; use the dense pull"
        )
    if A.device.type != "cuda" and not interpreted():
        raise ValueError(f"the kernel needs a GPU, found tensors on {A.device}; use the dense pull")
