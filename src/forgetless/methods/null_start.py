"""`null-start`: A starts in the directions beside those that inputs use most on general text.

    A <- a A (I - V V^T),   V the leading eigenvectors of E[x x^T] in the importance file, a so that
                            the norm of A stays

B starts at zero, so the model starts as the base, and the gradient of B sees what general text has
little of. After LoRA-Null (arXiv 2503.02659, by its abstract), which starts from the base weight's
part there, takes it out of the base and may freeze A; here the base stays, so that what holds can
be combined with it. V has the eigenvectors that the file keeps, at most half of all directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgetless.importance.covariance import AnyCovariance, LowRankCovariance
from forgetless.importance.entries import KroneckerEntry
from forgetless.methods.method import Setup
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight, wider

# Leading directions of a whole covariance, as many as a file keeps of one by default.
LEADING = 64


def leading_vectors(covariance: AnyCovariance) -> Tensor:
    """(n, k): the leading eigenvectors that are kept, at most half of all."""
    most = covariance.size // 2
    if not isinstance(covariance, LowRankCovariance):
        covariance = covariance.cut(min(LEADING, most))
    order = covariance.values.argsort(descending=True)
    return covariance.vectors[:, order[:most]]


@torch.no_grad()
def null_start(setup: Setup, model: nn.Module) -> None:
    """Start every A beside the leading directions of its inputs.

    Raises ValueError for importance that does not know directions.
    """
    assert setup.importance is not None
    for weight in target_weights(model):
        assert isinstance(weight, LowRankWeight)
        entry = setup.importance[weight.name]
        if not isinstance(entry, KroneckerEntry):
            raise ValueError(
                "--method null-start needs Kronecker importance, found "
                f"'{setup.importance.tier}'; record with --estimator kronecker"
            )
        A = weight.A.to(wider(weight.A.dtype))
        V = leading_vectors(entry.in_cov).to(A)
        beside = A - (A @ V) @ V.T
        weight.A.copy_(beside * (A.norm() / beside.norm()))
