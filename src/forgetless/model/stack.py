"""One adapter for several updates on top of each other: exactly their sum.

    U = U1 + U2 = [s1 B1, s2 B2] [A1; A2]        rank r1 + r2, alpha = rank, so the scale is 1

Their ranks stand side by side. With `rank` it has the nearest updates of that rank instead
(singular values of the product of thin factors), and the relative error of all weights together is
returned. The result is a plain PEFT adapter relative to the original base, whatever targets, ranks
and scales its summands had. Costs one loaded base model.

    stack(options, ["steps/1/final", "steps/2/final"], Path("final"))
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model.adapter_files import with_adapter
from forgetless.model.adapters import add_adapter, forget_adapters, without_adapter
from forgetless.model.loading import load_model, load_tokenizer, save_whole
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight
from forgetless.options.model import ModelOptions

ThinFactors = tuple[Tensor, Tensor]  # L (out, r), R (r, in)


def stack(
    options: ModelOptions, adapters: Sequence[str], out: Path, *, rank: int | None = None
) -> float:
    """Write the sum of the updates of `adapters` to the folder `out`, completely or not at all.

    `adapters` are folders that PEFT saved; one alone is copied. Returns the relative error that a
    smaller `rank` costs (Frobenius norm), 0 without.
    """
    tokenizer = load_tokenizer(options)
    if len(adapters) == 1 and rank is None:
        save_whole(Path(adapters[0]), tokenizer, out, shutil.copytree)
        return 0.0
    base: Any = load_model(options)
    summands: dict[str, list[ThinFactors]] = {}
    for adapter in adapters:
        base = _collect(base, adapter, summands)
    summed = {
        name: (torch.cat([L for L, _ in pairs], 1), torch.cat([R for _, R in pairs]))
        for name, pairs in summands.items()
    }
    width = max(R.shape[0] for _, R in summed.values())
    error = 0.0
    if rank is not None and rank < width:
        width = rank
        error = _cut_to_rank(summed, rank)
    paths = "|".join(re.escape(name.removesuffix(".weight")) for name in summed)
    model = add_adapter(base, names=f"(?:{paths})", rank=width, alpha=width)
    _fill(model, summed)
    save_whole(model, tokenizer, out)
    return error


def _fill(model: nn.Module, summed: dict[str, ThinFactors]) -> None:
    """Write factors into a fresh adapter of scale 1; of narrower ones the other rows are zero."""
    with torch.no_grad():
        for weight in target_weights(model):
            assert isinstance(weight, LowRankWeight)
            L, R = summed[weight.name]
            weight.A.zero_()
            weight.B.zero_()
            weight.A[: R.shape[0]] = R.to(weight.A)
            weight.B[:, : L.shape[1]] = L.to(weight.B)


def _cut_to_rank(summed: dict[str, ThinFactors], rank: int) -> float:
    """Replace every update by the nearest one of `rank`; the relative error of all together."""
    lost = 0.0
    total = 0.0
    for name, (L, R) in summed.items():
        near_L, near_R, squared, squared_lost = _nearest_of_rank(L, R, rank)
        summed[name] = near_L, near_R
        lost += squared_lost
        total += squared
    return math.sqrt(lost / total) if total > 0 else 0.0


def _nearest_of_rank(L: Tensor, R: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """L' (out, rank), R' (rank, in) nearest to L @ R, its squared norm, and what of it is lost.

    It works in f64, without an (out, in) matrix.
    """
    P, left = torch.linalg.qr(L.double())
    Q, right = torch.linalg.qr(R.double().T)
    U, values, V = torch.linalg.svd(left @ right.T)
    root = values[:rank].sqrt()
    return (
        (P @ U[:, :rank] * root).to(L),
        (root[:, None] * (V[:rank] @ Q.T)).to(R),
        float(values.square().sum()),
        float(values[rank:].square().sum()),
    )


def _collect(base: Any, adapter: str, summands: dict[str, list[ThinFactors]]) -> Any:
    """Add the factors of one adapter to `summands`; returns `base` without it again."""
    model: Any = with_adapter(base, adapter)
    for weight in target_weights(model):
        assert isinstance(weight, LowRankWeight)
        L, R = weight.factors()
        summands.setdefault(weight.name, []).append((L.clone(), R.clone()))
    base = without_adapter(model)
    forget_adapters(base)
    return base
