"""`wise`: the finished update scaled down, the cheapest strong baseline against forgetting (weight
interpolation: WiSE-FT, arXiv 2109.01903).

    U' = S U,    S given by --scale

With `oft` the rotation is scaled by what generates it: R = (I + Q)(I - Q)^-1 becomes that of S Q,
which is a rotation too (PEFT-Arena, where S = 0.4 was better than 1 on both axes; scaling the
weights instead was not). It costs nothing while training. For the largest scale that keeps a bound
on forgetting, checked on text that it was not chosen on, there is --budget.
"""

from __future__ import annotations

import torch
from torch import nn

from forgetless.methods.method import Setup
from forgetless.model.adapter_path import AdapterPath
from forgetless.model.linear import matching
from forgetless.model.precision import load_to_train
from forgetless.model.targets import adapter_types
from forgetless.model.update import Update


@torch.no_grad()
def wise(setup: Setup, model: nn.Module) -> dict[str, float]:
    """Scale the trained update in place; returns the scale."""
    o = setup.options
    assert o.scale is not None
    if o.full:
        base = dict(matching(load_to_train(o), o.targets))
        for path, module in matching(model, o.targets):
            start = base[path].weight.to(module.weight.device)
            module.weight.copy_(torch.lerp(start, module.weight, o.scale))
        return {"scale": o.scale}
    update = AdapterPath(model) if adapter_types(model) == "OFT" else Update(model)
    update.scale(o.scale)
    return {"scale": o.scale}
