"""The pull in closed form, a few rows at a time, for element-wise importance in any tier.

With D = U - U*, P = Omega * D and k = strength * c_l,

    grad_B[rows] = 2 k s P[rows] A^T
    grad_A      += 2 k s B[rows]^T P[rows]
    energy      += sum P[rows] * D[rows]

Nothing of (out, in) exists but the importance itself: U, the anchor and what is decoded from codes
are formed for one tile of rows and dropped. Tiles that stay in a CPU's cache also make it about 4
times as fast as whole matrices (4096 x 4096 in f32: 27 against 112 ms on one core). The order of
additions is fixed, so the result is the same at every call. Twin: dense.py.

    # D = L @ R (difference.py); entry.rows(slice) -> (rows, in) f32
    tiled.pull(A, B, scale, entry.rows, L, R, k=0.1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements of a tile, on a CPU per thread: 1 MiB of f32 stays in a core's cache, and a GPU wants few
# launches.
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}
RowReader = Callable[[slice], Tensor]


def pull(
    A: Tensor, B: Tensor, scale: float, omega: RowReader, L: Tensor, R: Tensor, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A (r, in), pull on B (out, r), energy) for D = U - U* = L @ R, (out, q) and (q, in).

    `omega(rows)` gives rows of the importance as (rows, in). Everything is in the dtype of A and B,
    which the caller has widened to at least f32.
    """
    pull_A, pull_B, energy = torch.zeros_like(A), torch.empty_like(B), A.new_zeros(())
    towards_base = R is A  # and then L is scale * B
    for rows in tiles(B.shape[0], A.shape[1], A.device):
        D = torch.mm(L[rows], R)  # (rows, in)
        if towards_base:
            P = D.mul_(omega(rows))
        else:
            P = omega(rows).to(D) * D
            energy += torch.dot(P.flatten(), D.flatten())
        torch.mm(P, A.T, out=pull_B[rows])
        pull_A.addmm_(B[rows].T, P)
    if towards_base:
        # The sum of P * (L A) is that of (P A^T) * L, which saves one pass over each tile.
        energy = (pull_B * L).sum()
    return pull_A.mul_(2 * k * scale), pull_B.mul_(2 * k * scale), energy


def full_pull(update: RowReader, omega: RowReader, into: Tensor, k: float) -> Tensor:
    """Full fine-tuning: write the pull 2 k Omega D on W into `into` (out, in); returns the energy.

    `update` gives rows of D = W - W(base) - U*, `omega` rows of the importance, both (rows, in).
    """
    energy = into.new_zeros(())
    for rows in tiles(into.shape[0], into.shape[1], into.device):
        D = update(rows).to(into)
        P = omega(rows).to(into) * D
        energy += torch.dot(P.flatten(), D.flatten())
        into[rows] = P.mul_(2 * k)
    return energy


def tiles(out: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows, each of about as many elements as suit the device."""
    size = TILE["cpu"] * torch.get_num_threads() if device.type == "cpu" else TILE["cuda"]
    rows = max(1, size // max(width, 1))
    return (slice(first, min(first + rows, out)) for first in range(0, out, rows))
