"""The Triton kernel behind fused.py; it is imported only where Triton is installed.

One program takes BM rows and `steps` tiles of BN columns of one weight. It reads importance and
factors once and writes partial results to places of its own. There are no atomics, so that the same
input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def importance_tile(
    omega,
    scale,
    rows,
    below,
    column,
    columns,
    inside,
    into,
    width,
    TIER: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(BM, BN) f32 of the importance, zero outside.

    The columns from `column` on lie within one block of the code (BN divides BLOCK), so each row
    has one scale.
    """
    if TIER == "u8":
        x = tl.load(omega + rows[:, None] * width + columns[None, :], mask=inside, other=0).to(
            tl.float32
        ) * (1 / 256)
        x = x * x
        x = x * x
    elif TIER == "u4":
        byte = tl.load(
            omega + rows[:, None] * width + columns[None, :] // 2, mask=inside, other=0
        ).to(tl.int32)
        code = tl.where((columns[None, :] % 2) == 1, byte >> 4, byte & 15)
        # 2^(code - 15), written into the exponent.
        x = tl.where(code > 0, ((code + 112) << 23).to(tl.float32, bitcast=True), 0.0)
    else:
        x = tl.load(omega + rows[:, None] * width + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    if CODED:
        blocks = (into + BLOCK - 1) // BLOCK
        scales = tl.load(scale + rows * blocks + column // BLOCK, mask=below, other=0.0)
        x = x * scales.to(tl.float32)[:, None]
    return x


@triton.jit
def pull_kernel(
    omega,
    scale,
    A,
    B,
    A0,
    B0,
    partial_A,
    partial_B,
    partial_energy,
    out,
    into,
    width,
    rank,
    rank0,
    s,
    steps,
    TIER: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
    ANCHORED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
    R0: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums, all f32, of the pulls without the factor 2 k s, and of the energy.

    They are partial_A (row tiles, R, in), partial_B (column groups, out, R) and partial_energy
    (row tiles, column groups).
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    rows = tile.to(tl.int64) * BM + tl.arange(0, BM)
    ranks, ranks0 = tl.arange(0, R), tl.arange(0, R0)
    below = rows < out
    b = tl.load(
        B + rows[:, None] * rank + ranks[None, :],
        mask=below[:, None] & (ranks < rank)[None, :],
        other=0.0,
    ).to(tl.float32)  # (BM, R)
    if ANCHORED:
        b0 = tl.load(
            B0 + rows[:, None] * rank0 + ranks0[None, :],
            mask=below[:, None] & (ranks0 < rank0)[None, :],
            other=0.0,
        ).to(tl.float32)
    pull_b = tl.zeros((BM, R), tl.float32)
    energy = tl.zeros((BM,), tl.float32)
    for step in range(steps):
        column = (group * steps + step) * BN
        columns = column + tl.arange(0, BN)
        left = columns < into
        inside = below[:, None] & left[None, :]
        a = tl.load(
            A + ranks[:, None] * into + columns[None, :],
            mask=(ranks < rank)[:, None] & left[None, :],
            other=0.0,
        ).to(tl.float32)  # (R, BN)
        d = s * tl.dot(b, a, input_precision=PRECISION)  # (BM, BN)
        if ANCHORED:
            a0 = tl.load(
                A0 + ranks0[:, None] * into + columns[None, :],
                mask=(ranks0 < rank0)[:, None] & left[None, :],
                other=0.0,
            ).to(tl.float32)
            d -= tl.dot(b0, a0, input_precision=PRECISION)
        w = importance_tile(
            omega, scale, rows, below, column, columns, inside, into, width, TIER, CODED, BLOCK
        )
        p = w * d
        energy += tl.sum(p * d, axis=1)
        pull_b += tl.dot(p, tl.trans(a), input_precision=PRECISION)
        # (R, BN): only this program has these rows, so it is a partial sum over them.
        pull_a = tl.dot(tl.trans(b), p, input_precision=PRECISION)
        places = (tile.to(tl.int64) * R + ranks[:, None]) * into + columns[None, :]
        tl.store(partial_A + places, pull_a, mask=left[None, :])
    places = (group.to(tl.int64) * out + rows[:, None]) * R + ranks[None, :]
    tl.store(partial_B + places, pull_b, mask=below[:, None])
    tl.store(partial_energy + tile * tl.num_programs(1) + group, tl.sum(energy, axis=0))
