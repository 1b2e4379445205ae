"""What a form does to the energy: its relative error on two fixed updates U of each weight.

    random     U = L R, rank 8, normal elements: an update that knows nothing of importance
    evading    the same shrunk where importance is large, U / (1 + 100 Omega / mean of Omega), as
               training under a penalty does: it lives on the elements that codes round off first.
               For covariances G, A: L and R are shrunk by the diagonals of G and of A instead

The error is |energy after - energy before| / energy before. It costs a few passes over an (out, in)
tensor for each weight; from covariances to covariances only products with 8 columns.

    random, evading = energy_errors(entry, converted["model.layers.0.mlp.up_proj.weight"])
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetless.importance.entries import Entry, KroneckerEntry

# Rank of the updates: what adapters usually have.
UPDATE_RANK = 8
# By how much the evading update shrinks, for each mean of Omega that an element has. The codes were
# chosen by the same update (codec.py).
SHRINK = 100.0


def energy_errors(before: Entry, after: Entry) -> tuple[float, float]:
    """(random, evading): relative errors of the energy under `after`; 0 where both are zero, 1
    where only `before` is.
    """
    if after is before:
        return 0.0, 0.0
    g = torch.Generator().manual_seed(0)
    out, into = before.shape
    device = next(iter(before.tensors().values())).device
    L = torch.randn(out, UPDATE_RANK, generator=g).to(device)
    R = torch.randn(UPDATE_RANK, into, generator=g).to(device)
    if isinstance(before, KroneckerEntry):
        shrunk_L = L / _shrinking(before.out_cov.diagonal())[:, None]
        shrunk_R = R / _shrinking(before.in_cov.diagonal())
        return (
            _thin_error(before, after, L, R),
            _thin_error(before, after, shrunk_L, shrunk_R),
        )
    U = L @ R
    random = _relative(before.energy(U), after.energy(U))
    U /= _shrinking(before.dense()).to(U)
    return random, _relative(before.energy(U), after.energy(U))


def _shrinking(omega: Tensor) -> Tensor:
    """1 + 100 Omega / mean of Omega; 1 where all of it is zero."""
    return 1 + SHRINK * omega / omega.mean().clamp(min=torch.finfo(omega.dtype).tiny)


def _thin_error(before: Entry, after: Entry, L: Tensor, R: Tensor) -> float:
    """The error on L @ R."""
    return _relative(_thin_energy(before, L, R), _thin_energy(after, L, R))


def _thin_energy(entry: Entry, L: Tensor, R: Tensor) -> Tensor:
    """The energy of L @ R; without the product where the entry has covariances."""
    if not isinstance(entry, KroneckerEntry):
        return entry.energy(L @ R)
    return torch.sum((L.T @ entry.out_cov.apply(L)) * (R @ entry.in_cov.apply(R.T)))


def _relative(before: Tensor, after: Tensor) -> float:
    was, now = float(before), float(after)
    return abs(now - was) / was if was > 0 else float(now > 0)
