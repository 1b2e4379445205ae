"""What a tier does to the energy: its relative error on two fixed updates U of each weight.

    random     U = L R, rank 8, normal elements: an update that knows nothing of importance
    evading    the same shrunk where importance is large, U / (1 + 100 Omega / mean of Omega), as training under a penalty does: it lives on the elements
               that codes round off first. For covariances G, A: L and R are shrunk by the diagonals of G and of A instead

Error = |energy after - energy before| / energy before. Cost per weight: a few passes over an (out, in) tensor; from covariances to covariances only products
with 8 columns.

    random, evading = energy_errors(entry, converted["model.layers.0.mlp.up_proj.weight"])
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.importance.entries import Entry, KroneckerEntry

RANK, SHRINK = 8, 100.0


def energy_errors(before: Entry, after: Entry) -> tuple[float, float]:
    """(random, evading): relative errors of the energy under `after`; 0 where both are zero, 1 where only `before` is."""
    if after is before:
        return 0.0, 0.0
    g = torch.Generator().manual_seed(0)
    out, into = before.shape
    like = next(iter(before.tensors().values()))
    L, R = (torch.randn(*shape, generator=g).to(like.device) for shape in ((out, RANK), (RANK, into)))
    if isinstance(before, KroneckerEntry):
        shrunk = (L / _shrink(before.out_cov.diagonal())[:, None], R / _shrink(before.in_cov.diagonal()))
        first, second = (_error(_thin_energy(before, *pair), _thin_energy(after, *pair)) for pair in ((L, R), shrunk))
        return first, second
    U = L @ R
    first = _error(before.energy(U), after.energy(U))
    U /= _shrink(before.dense()).to(U)
    return first, _error(before.energy(U), after.energy(U))


def _shrink(omega: Tensor) -> Tensor:
    """1 + 100 Omega / mean of Omega; 1 where all of it is zero."""
    return 1 + SHRINK * omega / omega.mean().clamp(min=torch.finfo(omega.dtype).tiny)


def _thin_energy(entry: Entry, L: Tensor, R: Tensor) -> Tensor:
    """The energy of L @ R; without the product where the entry has covariances."""
    if not isinstance(entry, KroneckerEntry):
        return entry.energy(L @ R)
    return torch.sum((L.T @ entry.out_cov.apply(L)) * (R @ entry.in_cov.apply(R.T)))


def _error(before: Tensor, after: Tensor) -> float:
    was, now = float(before), float(after)
    return abs(now - was) / was if was > 0 else float(now > 0)
