"""Block codes for importance: non-negative numbers over many orders of magnitude in 8 or 4 bits,
with one scale per 128 of them along the input dimension.

    value = scale * table[code]
            u8: table[c] = (c / 256)^4                   top : smallest step = 4e9 : 1
            u4: table[c] = 2^(c - 15), table[0] = 0      top : smallest step = 2^14 : 1
    code  = the table entry nearest to value / (largest value of the block) * table[top]
    scale = sum of the block's values / sum of its table entries, in bf16

Zero is exact. Within a block decoding never turns an order round. The scale keeps the sum of each
block (to bf16's 2^-9), so the energy is unbiased for updates that don't depend on importance:
stochastic rounding would be too, at 1.4 times the error, and files would no longer be the same
twice. The fourth power beats geometric steps of equal reach (half the error of the pull); with 15
levels, steps of 2 are the finest that reach far enough for an update that evades important
elements.

| tier | bytes per weight | finished update: energy, pull | evading update: energy, pull |
|------|------------------|-------------------------------|------------------------------|
| u8   | 1.016            | 0.01 %, 0.4 %                 | 0.07 %, 2 %                  |
| u4   | 0.516            | 0.15 %, 9 %                   | 1.9 %, 20 %                  |

These are relative errors on recorded path and Fisher importance of a 5M Llama, the worse of the
two, all weights together. The evading update is U / (1 + 100 Omega / mean). Rounding moves one
element by at most 2 / c of itself in u8 (0.8 % at the top, 4 % at a thousandth of it) and by a
third in u4, before the scale evens out the block's sum. Blocks whose largest value is below 1e-37
lose precision with the scale; values above 3.3e38 are cut there.

    codes, scale = encode(omega, "u8")
    decode(codes, scale, omega.shape, "u8")           # (out, in) f32; or rows of it
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Values per scale: a scale in bf16 then costs an eighth of a bit a value.
BLOCK = 128
BITS = {"u8": 8, "u4": 4}
# The value of each code, relative to its block's scale, exactly as f32 has it.
TABLES = {
    "u8": [struct.unpack("f", struct.pack("f", (c / 256) ** 4))[0] for c in range(256)],
    "u4": [0.0] + [2.0 ** (c - 15) for c in range(1, 16)],
}
# The largest scale that bf16 holds.
LARGEST_SCALE = float(torch.finfo(torch.bfloat16).max)
# Values encoded at a time: the f64 buffers stay small.
CHUNK = 1 << 20


def encode(values: Tensor, tier: str) -> tuple[Tensor, Tensor]:
    """(codes, scale) of non-negative `values` (out, in).

    codes: u8 (out, in), or two to a byte (out, ceil(in / 2)) in u4, even columns in the low half.
    scale: bf16 (out, ceil(in / 128)). Raises ValueError for an unknown tier, other shapes, negative
    and non-finite values.
    """
    table = torch.tensor(_table(tier), dtype=torch.float64, device=values.device)
    if values.ndim != 2:
        raise ValueError(
            f"expected importance (out, in), found shape {tuple(values.shape)}; flatten other "
            "shapes to two dimensions"
        )
    if values.numel() and not (bool(torch.isfinite(values).all()) and float(values.min()) >= 0):
        raise ValueError(
            "expected finite, non-negative importance; record again with a lower learning rate "
            "or in f32"
        )
    out, into = values.shape
    codes = torch.empty((out, stored_width(into, tier)), dtype=torch.uint8, device=values.device)
    scale = torch.empty((out, blocks(into)), dtype=torch.bfloat16, device=values.device)
    rows = max(1, CHUNK // max(into, 1))
    for first in range(0, out, rows):
        codes[first : first + rows], scale[first : first + rows] = _encode_rows(
            values[first : first + rows], table, tier
        )
    return codes, scale


def _encode_rows(values: Tensor, table: Tensor, tier: str) -> tuple[Tensor, Tensor]:
    rows, into = values.shape
    width = blocks(into) * BLOCK
    # In f64, so that sums and quotients are those of the reference.
    x = torch.nn.functional.pad(values.double(), (0, width - into)).view(rows, -1, BLOCK)
    top = x.amax(-1, keepdim=True)
    relative = torch.where(top > 0, x / top, 0.0) * table[-1]
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2)  # ties go down
    used = table[codes].sum(-1)
    scale = torch.where(used > 0, x.sum(-1) / used, 0.0).clamp(max=LARGEST_SCALE).float().bfloat16()
    codes = codes.to(torch.uint8).view(rows, width)
    if tier == "u4":
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes[:, : stored_width(into, tier)], scale


def decode(
    codes: Tensor, scale: Tensor, shape: Sequence[int], tier: str, rows: slice = slice(None)
) -> Tensor:
    """The values of `rows` of an encoded (out, in) weight, f32 (rows, in): scale times table entry,
    rounded once to f32.
    """
    codes, scale, into = codes[rows], scale[rows].float(), shape[1]
    if tier == "u8":
        # (c / 256)^4 as two squarings: the table's entries to the bit, and three times as fast as
        # looking them up.
        x = codes.to(torch.float32).mul_(1 / 256)
        x.mul_(x).mul_(x)
    else:
        both = _both_values(tier, codes.device).index_select(0, codes.reshape(-1).int())
        x = both.view(torch.float32).view(codes.shape[0], -1)[:, :into]
    whole = into - into % BLOCK
    head = x[:, :whole].unflatten(1, (-1, BLOCK)) if whole else None
    if head is not None:
        head.mul_(scale[:, : whole // BLOCK, None])
    if whole < into:
        x[:, whole:].mul_(scale[:, -1:])
    return x


@functools.lru_cache(maxsize=8)
def _both_values(tier: str, device: torch.device) -> Tensor:
    """Both values of each u4 byte, side by side in 8 bytes: one look-up for two values."""
    table = torch.tensor(_table(tier), dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((table[byte & 15], table[byte >> 4]), -1).view(torch.int64).view(-1)


def norm(codes: Tensor, scale: Tensor, shape: Sequence[int], tier: str) -> float:
    """Frobenius norm of the decoded values, accumulated in f64, a few rows at a time."""
    rows = max(1, CHUNK // max(shape[1], 1))
    parts = [
        float(decode(codes, scale, shape, tier, slice(i, i + rows)).double().square().sum())
        for i in range(0, shape[0], rows)
    ]
    return math.sqrt(sum(parts))


def blocks(into: int) -> int:
    """Scales in a row of `into` values."""
    return -(-into // BLOCK)


def stored_width(into: int, tier: str) -> int:
    """Bytes of codes in a row of `into` values."""
    return -(-into * BITS[tier] // 8)


def stored_bytes(shape: Sequence[int], tier: str) -> int:
    """Bytes of codes and scales of an (out, in) weight."""
    return shape[0] * (stored_width(shape[1], tier) + 2 * blocks(shape[1]))


def check_codes(where: str, codes: Tensor, scale: Tensor, shape: Sequence[int], tier: str) -> None:
    """Raise ValueError, beginning with `where`, unless codes and scale can be those of an (out, in)
    weight.
    """
    _table(tier)
    out, into = shape
    for what, tensor, expected, dtype in (
        ("codes", codes, (out, stored_width(into, tier)), torch.uint8),
        ("scale", scale, (out, blocks(into)), torch.bfloat16),
    ):
        if tuple(tensor.shape) != expected or tensor.dtype != dtype:
            raise ValueError(
                f"{where}.{what} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected} "
                f"{dtype} for ({out}, {into}) in {tier}; "
                "the file is damaged, convert or record again"
            )
    if scale.numel() and not (bool(torch.isfinite(scale).all()) and float(scale.min()) >= 0):
        raise ValueError(
            f"{where}.scale has negative or non-finite values; the file is damaged, convert or "
            "record again"
        )


def _table(tier: str) -> list[float]:
    if tier not in TABLES:
        raise ValueError(f"unknown code '{tier}'; known: {', '.join(TABLES)}")
    return TABLES[tier]


def encode_reference(row: Sequence[float], tier: str) -> tuple[list[int], list[float]]:
    """`encode` of one row, number by number: (unpacked codes, one scale per block).

    This is the specification.
    """
    table, codes, scales = _table(tier), [], []
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    for first in range(0, len(row), BLOCK):
        block = row[first : first + BLOCK]
        top = max(block)
        relative = [value / top * table[-1] if top > 0 else 0.0 for value in block]
        mine = [bisect.bisect_left(midpoints, value) for value in relative]
        used = math.fsum(table[c] for c in mine)
        codes += mine
        scales.append(_bf16(min(math.fsum(block) / used, LARGEST_SCALE)) if used > 0 else 0.0)
    return codes, scales


def decode_reference(codes: Sequence[int], scales: Sequence[float], tier: str) -> list[float]:
    """`decode` of one row of unpacked codes, number by number."""
    table = _table(tier)
    return [_f32(table[code] * scales[i // BLOCK]) for i, code in enumerate(codes)]


def _f32(x: float) -> float:
    value: Any = struct.unpack("f", struct.pack("f", x))[0]
    return float(value)


def _bf16(x: float) -> float:
    """Round to f32, then to the nearest bf16, ties to even."""
    bits = struct.unpack("I", struct.pack("f", x))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return float(struct.unpack("f", struct.pack("I", bits))[0])
