"""The way from the base to a finished adapter of any kind, along the adapter's own parameters.

    path = AdapterPath(model)        # an adapter as PEFT loads it
    path.scale(0.5)                  # half of the way; scale(0) is the base, scale(1) the adapter

Each kind of adapter has parameters at which it does nothing: LoRA's B at zero, OFT's generator at
zero (its rotation is then none), IA3's factors at one. The path is the straight line from there to
what was trained, and every point on it is an adapter of the same kind that PEFT saves and loads.
For LoRA, whole modules, biases and single tokens it is the update times a number; for OFT it is a
part of each rotation, and for DoRA direction and length go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model.adapters import active_lora_layers
from forgetless.model.base_values import base_biases, named_biases, trains_biases
from forgetless.model.beside import Moved, is_of_tokens, of_copy, of_tokens
from forgetless.model.linear import is_conv1d, unwrapped
from forgetless.model.targets import adapter_types, moves_the_base
from forgetless.model.update import AdapterUpdate

# Name of an adapter's parameters by layer -> the value at which the layer does what the base does.
# Of a product of factors one is enough. All others stay as they were trained.
AT_REST = {
    "lora_B": 0.0,
    "lora_embedding_A": 0.0,
    "oft_R": 0.0,
    "oft_embedding_R": 0.0,
    "boft_R": 0.0,
    "boft_s": 1.0,
    "ia3_l": 1.0,
    "vera_lambda_b": 0.0,
    "hada_w2_b": 0.0,
    "lokr_w1": 0.0,
    "lokr_w1_a": 0.0,
}


class AdapterPath:
    """The path of the active adapter of a model.

    Raises ValueError for adapters that start away from the base, or have no known way back to it.
    """

    def __init__(self, model: nn.Module):
        _check_starts_at_base(model)
        with torch.no_grad():
            self._moved = [
                Moved(parameter, parameter.detach().clone(), rest.to(parameter))
                for parameter, rest in _resting(model)
            ]

    @property
    def parameters(self) -> list[Tensor]:
        """What moves along the path."""
        return [moved.parameter for moved in self._moved]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Go to `factor` of the way; at 1 everything is as it was trained, bit for bit."""
        for moved in self._moved:
            moved.scale(factor)

    @torch.no_grad()
    def randomise(self, size: float, seed: int = 0) -> None:
        """Leave the base in a random direction, the same at every call with this seed, by `size`
        in root mean square of the parameters.
        """
        generator = torch.Generator().manual_seed(seed)
        for moved in self._moved:
            noise = torch.randn(moved.rest.shape, generator=generator).to(moved.rest)
            moved.parameter.copy_(moved.rest + size * noise)


def scaled_update(model: nn.Module) -> AdapterUpdate | AdapterPath:
    """The update of a finished adapter to evaluate at other scales: of LoRA alone by its layers'
    own scale, which costs and rounds nothing, of any other along its parameters.
    """
    if trained_beside_factors(model):
        return AdapterPath(model)
    return AdapterUpdate(model)


def trained_beside_factors(model: Any) -> list[str]:
    """What the adapters of a model train beside LoRA's factors, in words."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = set()
    for module in unwrapped(model).modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            found.add("whole modules or tokens")
        elif isinstance(module, LoraLayer):
            if len(module.lora_magnitude_vector):
                found.add("DoRA's magnitudes")
        elif isinstance(module, BaseTunerLayer) and not is_of_tokens(module):
            found.add(adapter_types(model))
    if trains_biases(model):
        found.add("biases")
    if moves_the_base(model):
        found.add("a base that it moved")
    return sorted(found)


def _check_starts_at_base(model: Any) -> None:
    if moves_the_base(model):
        raise ValueError(
            "the adapter starts away from the base model (init_lora_weights moves the base "
            "weight), so its update cannot be scaled; convert it to plain LoRA (PEFT: "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _resting(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of the adapter, its value at rest) of all that the active adapter trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    base = unwrapped(model)
    count = 0
    for module in base.modules():
        if isinstance(module, ModulesToSaveWrapper):
            found = list(of_copy(module))
        elif isinstance(module, BaseTunerLayer):
            found = list(of_tokens(module) if is_of_tokens(module) else _of_layer(module))
            if not found:
                raise ValueError(
                    f"{type(module).__name__} of {adapter_types(model)} has no known way back to "
                    "the base; merge it (forgetless merge), and use the merged model by --tuned"
                )
        else:
            continue
        count += len(found)
        yield from found
    yield from _magnitudes(model)
    if trains_biases(model):
        before = base_biases(model)
        yield from ((bias, before[name]) for name, bias in named_biases(base))
    if not count:
        raise ValueError(f"the model has no adapter to scale (found {adapter_types(model)})")


def _of_layer(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters of one adapted layer, of its active adapters."""
    for name, value in AT_REST.items():
        held: Any = getattr(layer, name, None)
        for adapter in layer.active_adapters if held is not None else ():
            if adapter not in held:
                continue
            entry = held[adapter]
            tensors = [entry] if isinstance(entry, Tensor) else entry.parameters()
            yield from ((tensor, torch.full_like(tensor, value)) for tensor in tensors)


def _magnitudes(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """DoRA's magnitudes, which rest at the lengths of the base's rows."""
    from peft.utils.integrations import dequantize_module_weight

    for layer, adapter in active_lora_layers(model):
        if adapter not in layer.lora_magnitude_vector:
            continue
        inner = layer.get_base_layer()
        weight = dequantize_module_weight(inner).detach()
        magnitude = layer.lora_magnitude_vector[adapter].weight
        W = weight.T if is_conv1d(inner) else weight
        if magnitude.shape != W.shape[:1]:
            raise ValueError(
                f"DoRA on {type(inner).__name__} has no known way back to the base; merge it "
                "(forgetless merge), and use the merged model by --tuned"
            )
        yield magnitude, torch.linalg.norm(W.to(magnitude.dtype), dim=1)
