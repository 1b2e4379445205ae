"""`wise`: the finished update scaled down, the cheapest strong baseline against forgetting (weight
interpolation: WiSE-FT, arXiv 2109.01903).

    U' = S U,    S given (--scale), or the largest of 0.05, 0.10, ..., 1 whose rise of the general
                 loss is at most --max-forgetting nats per token

The bound is checked on --general, the text on which forgetting is then reported: what is reported
after a choice is a little too good; measure again on other text (`forgetless eval`) before you
promise anything. The choice bisects, taking forgetting to grow with S: five evaluations. Costs
nothing while training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from forgetless.data.documents import load_documents
from forgetless.errors import OptionError
from forgetless.evaluate.losses import TextLoss, general_loss
from forgetless.methods.method import Setup
from forgetless.model.linear import matching
from forgetless.model.loading import load_model
from forgetless.model.update import Update
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")
STEPS = 20  # scales tried are multiples of 1 / STEPS


def check(options: TuneOptions) -> None:
    """One of --scale and --max-forgetting, the latter with text to measure on."""
    if (options.scale is None) == (options.max_forgetting is None):
        raise OptionError("--method wise needs --scale S or --max-forgetting NATS, one of them")
    if options.max_forgetting is not None and not options.general:
        raise OptionError(
            "--max-forgetting measures on held-out general text: give --general TEXT (other than "
            "--replay)"
        )


def wise(setup: Setup, model: nn.Module) -> dict[str, Any]:
    """Scale the trained update in place; returns the scale and the forgetting at every scale tried,
    in nats per token.
    """
    o = setup.options
    set_scale = scaler(setup, model)
    if o.scale is not None:
        set_scale(o.scale)
        return {"scale": o.scale, "tried": {}}
    assert o.general is not None and o.max_forgetting is not None and setup.before is not None
    bound, before = o.max_forgetting, TextLoss.read(setup.before["general"])
    documents = load_documents(
        o.general, column=o.text_column, split=o.general_split, limit=o.limit
    )
    tried: dict[float, float] = {}

    def meets(step: int) -> bool:
        set_scale(step / STEPS)
        lost = before.rise(general_loss(model, setup.tokenizer, documents)).nats
        tried[step / STEPS] = lost
        return lost <= bound

    scale = largest(meets) / STEPS
    set_scale(scale)
    logger.info(
        "wise: scale %g keeps forgetting at most %g nats per token on %s", scale, bound, o.general
    )
    return {"scale": scale, "tried": dict(sorted(tried.items()))}


def largest(meets: Callable[[int], bool]) -> int:
    """The largest step of 0 to STEPS that meets, if larger steps never meet where a smaller one
    does not; 0 (the base) always does.
    """
    if meets(STEPS):
        return STEPS
    low, high = 0, STEPS  # low meets, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def scaler(setup: Setup, model: nn.Module) -> Callable[[float], None]:
    """A function: scale -> the model with its finished update times that.

    Keeps one copy of what was trained, and for full fine-tuning one of the base model's weights.
    """
    o = setup.options
    if not o.full:
        return Update(model).scale
    base = dict(matching(load_model(o), o.targets))
    weights: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []  # now, finished, base's
    for path, module in matching(model, o.targets):
        W = module.weight
        weights.append((W, W.detach().clone(), base[path].weight.to(W.device)))

    @torch.no_grad()
    def set_scale(scale: float) -> None:
        for W, finished, start in weights:
            W.copy_(torch.lerp(start, finished, scale))

    return set_scale
