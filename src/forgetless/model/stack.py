"""One adapter for several updates on top of each other: their ranks side by side, so that it is
their sum exactly.

    U = U1 + U2 = [s1 B1, s2 B2] [A1; A2]        rank r1 + r2, alpha = rank, so the scale is 1

With `rank` the nearest updates of that rank instead (singular values of the product of thin
factors), and the relative error of all weights together is returned. A plain PEFT adapter relative
to the original base, whatever targets, ranks and scales the parts had. Costs one loaded base model.

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
from torch import Tensor

from forgetless.model.adapter_files import with_adapter
from forgetless.model.adapters import add_adapter
from forgetless.model.loading import load_model, load_tokenizer, save_whole
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight
from forgetless.options.model import ModelOptions

Factors = tuple[Tensor, Tensor]  # L (out, r), R (r, in)


def stack(
    options: ModelOptions, adapters: Sequence[str], out: Path, *, rank: int | None = None
) -> float:
    """Write the sum of the updates of `adapters`, folders of PEFT's, to the folder `out`: whole or
    not at all. One alone is copied.

    Returns the relative error that a smaller `rank` costs (Frobenius norm), 0 without.
    """
    tokenizer = load_tokenizer(options)
    if len(adapters) == 1 and rank is None:
        save_whole(Path(adapters[0]), tokenizer, out, shutil.copytree)
        return 0.0
    base: Any = load_model(options)
    parts: dict[str, list[Factors]] = {}
    for adapter in adapters:
        base = _collect(base, adapter, parts)
    summed = {
        name: (torch.cat([L for L, _ in pairs], 1), torch.cat([R for _, R in pairs]))
        for name, pairs in parts.items()
    }
    width = max(R.shape[0] for _, R in summed.values())
    lost = total = 0.0
    if rank is not None and rank < width:
        width = rank
        for name, pair in summed.items():
            L, R, whole, cut = _nearest(*pair, rank)
            summed[name] = L, R
            lost, total = lost + cut, total + whole
    paths = "|".join(re.escape(name.removesuffix(".weight")) for name in parts)
    model = add_adapter(base, names=f"(?:{paths})", rank=width, alpha=width)
    with torch.no_grad():
        for weight in target_weights(model):
            assert isinstance(weight, LowRankWeight)
            L, R = summed[weight.name]
            weight.A.zero_()  # where a weight was in fewer of the adapters, the other rows stay so
            weight.B.zero_()
            weight.A[: R.shape[0]] = R.to(weight.A)
            weight.B[:, : L.shape[1]] = L.to(weight.B)
    save_whole(model, tokenizer, out)
    return math.sqrt(lost / total) if total > 0 else 0.0


def _nearest(L: Tensor, R: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """L (out, rank), R (rank, in) nearest to L @ R, the squared norm of the product, and that of
    what is lost; in f64, no (out, in) matrix.
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


def _collect(base: Any, adapter: str, parts: dict[str, list[Factors]]) -> Any:
    """Add the factors of one adapter to `parts`; `base` without it again."""
    model: Any = with_adapter(base, adapter)
    for weight in target_weights(model):
        assert isinstance(weight, LowRankWeight)
        L, R = weight.factors()
        parts.setdefault(weight.name, []).append((L.clone(), R.clone()))
    base = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base
