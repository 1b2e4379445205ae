"""What moved beside what matters: for each target weight of a tuned model, the norm of its update,
its importance, and how strongly it was held.

    moved(peft_model, importance, layers)
    # [MovedWeight(weight, layer, kind, movement, importance, coefficient), ...]

The movement is ||U||_F. For LoRA, U = L R with thin factors, and
||L R||_F^2 = sum((L^T L) * (R R^T)), so nothing of the weight's size is made.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from forgetless.files.measured_json import MovedWeight
from forgetless.importance.importance import Importance
from forgetless.model.adapters import has_adapter
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight


def moved(
    model: nn.Module, importance: Importance | None = None, layers: Any = None
) -> list[MovedWeight] | None:
    """A row for each LoRA weight; its importance and coefficient are None without a file.

    None instead of rows where the update is not LoRA's, since its base is not at hand.
    """
    if not has_adapter(model):
        return None
    try:
        weights = target_weights(model)
    except ValueError:  # another kind of adapter
        return None
    norms: dict[str, float] = {}
    coefficients: dict[str, float] = {}
    if importance is not None:
        # The file's norms cover weights whose importance another process keeps.
        norms = {**importance.info.get("norms", {}), **importance.norms()}
    if importance is not None and layers is not None:
        coefficients = layers.coefficients(norms, weights)
    return [
        MovedWeight(
            weight=weight.name,
            layer=weight.layer,
            kind=weight.kind,
            movement=_update_norm(weight),
            importance=norms.get(weight.name),
            coefficient=coefficients.get(weight.name),
        )
        for weight in weights
        if isinstance(weight, LowRankWeight)
    ]


def _update_norm(weight: LowRankWeight) -> float:
    """||U||_F, accumulated in f64.

    Squares of the factors' products are added up, and may cancel where an initial product was taken
    away.
    """
    L, R = (factor.cpu().double() for factor in weight.factors())  # (out, q), (q, in)
    return float(((L.T @ L) * (R @ R.T)).sum().clamp(min=0).sqrt())
