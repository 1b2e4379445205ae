"""What is trained beside the weights that are held: biases, whole modules, rows of single tokens.

    moved = beside(model, target_weights(model))     # each with the base that it came from
    names_beside(model, weights)                     # what to tell the user that nothing holds

No importance belongs to these, so no pull holds them. A budget covers them: they are scaled and
brought back with the rest of the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model.weights import TargetWeight


@dataclass(frozen=True)
class Moved:
    """A parameter, where it was trained to, and where it rests: at the base."""

    parameter: Tensor
    trained: Tensor
    rest: Tensor

    def scale(self, factor: float) -> None:
        """Go to `factor` of the way; at 1 it is as it was trained, bit for bit."""
        if factor == 1:
            self.parameter.copy_(self.trained)
        else:
            self.parameter.copy_(self.rest + factor * (self.trained - self.rest))


def names_beside(model: nn.Module, weights: Sequence[TargetWeight]) -> list[str]:
    """The parameters that require a gradient and belong to none of the target weights."""
    held = {id(parameter) for weight in weights for parameter in weight.parameters}
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in held]


@torch.no_grad()
def beside(model: nn.Module, weights: Sequence[TargetWeight]) -> list[Moved]:
    """What is trained beside the target weights, with its base: PEFT's copy of that where it keeps
    one, else what it is now.
    """
    wanted = set(names_beside(model, weights))
    if not wanted:
        return []
    rests = {id(parameter): rest for parameter, rest in _with_known_base(model)}
    moved = []
    for name, parameter in model.named_parameters():
        if name in wanted:
            now = parameter.detach().clone()
            rest = rests.get(id(parameter))
            moved.append(Moved(parameter, now, now if rest is None else rest.to(now).clone()))
    return moved


def _with_known_base(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield from of_copy(module)
        elif is_of_tokens(module):
            yield from of_tokens(module)


def of_copy(wrapper: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, its base) of a module that PEFT trains whole, in a copy."""
    for adapter in wrapper.active_adapters:
        originals = dict(wrapper.original_module.named_parameters())
        for name, parameter in wrapper.modules_to_save[adapter].named_parameters():
            yield parameter, originals[name].detach()


def is_of_tokens(module: Any) -> bool:
    """Whether a layer of PEFT's trains rows of single tokens."""
    return hasattr(module, "trainable_tokens_delta") and hasattr(module, "token_indices")


def of_tokens(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows of single tokens, those of the base)."""
    for adapter in layer.active_adapters:
        rows = layer.get_base_layer().weight.detach()[layer.token_indices[adapter]]
        yield layer.trainable_tokens_delta[adapter], rows.clone()
