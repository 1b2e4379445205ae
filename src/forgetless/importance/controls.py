"""Controls that any estimate of importance must beat: the same for every element, and the right
values in the wrong places.

    uniform(model, "all-linear")     Omega = 1: L2 to the anchor; arbitrary unit, no text needed
    shuffled(importance, seed=0)     each weight's values in a random order: same norm and
                                     distribution, no knowledge of which element
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance
from forgetless.importance.entries import DenseEntry, Entry, FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.importance.info import Estimate, of_model
from forgetless.model.targets import base_layers


def uniform(model: nn.Module, names: str = "all-linear") -> Importance:
    """Importance 1 for every element of the weights that `names` chooses, factored, so that it
    costs nothing.
    """
    entries: dict[str, Entry] = {
        layer.name: FactoredEntry(torch.ones(layer.shape[0], 1), torch.ones(layer.shape[1], 1))
        for layer in base_layers(model, names)
    }
    norms = {name: entry.norm() for name, entry in entries.items()}
    about = Estimate(estimator="uniform", unit="1", tier="factored", settings={}, norms=norms)
    return Importance(entries, {}, {**about.info(), **of_model(model)})


def shuffled(importance: Importance, seed: int = 0) -> Importance:
    """`importance` permuted at random within each weight: dense by element, factored and kronecker
    by rows and by columns, so that they keep their form.

    The permutation of a weight depends on the seed and its place in the file. Weights that share an
    input covariance still do.
    """
    g = torch.Generator().manual_seed(seed)
    moved: dict[int, AnyCovariance] = {}
    entries = {name: _shuffled(entry, g, moved) for name, entry in importance.entries.items()}
    info = {key: value for key, value in importance.info.items() if key != "path"}
    return Importance(
        entries,
        importance.anchors,
        {**info, "settings": {**info.get("settings", {}), "shuffled_seed": seed}},
    )


def _shuffled(entry: Entry, g: torch.Generator, moved: dict[int, AnyCovariance]) -> Entry:
    order = lambda n, like: torch.randperm(n, generator=g).to(like.device)
    if isinstance(entry, FactoredEntry):
        row = entry.row[order(entry.shape[0], entry.row)]
        col = entry.col[order(entry.shape[1], entry.col)]
        return FactoredEntry(row, col)
    if isinstance(entry, KroneckerEntry):
        for cov in (entry.out_cov, entry.in_cov):
            if id(cov) not in moved:
                moved[id(cov)] = _turned(cov, order(cov.size, cov.diagonal()))
        return KroneckerEntry(moved[id(entry.out_cov)], moved[id(entry.in_cov)])
    values = entry.dense()
    return DenseEntry(values.flatten()[order(values.numel(), values)].view(entry.shape))


def _turned(cov: AnyCovariance, order: Tensor) -> AnyCovariance:
    if isinstance(cov, Covariance):
        return Covariance(cov.matrix[order][:, order])
    return LowRankCovariance(cov.vectors[order], cov.values, cov.floor)
