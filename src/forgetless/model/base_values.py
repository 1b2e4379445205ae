"""What the base had where an adapter trains the base's own tensors: its biases.

    remember_biases(model)            # before an adapter is loaded, or trained, on them
    base_biases(model)                # name -> the bias as it was then

PEFT keeps the base of everything else that it trains: beside a layer's factors, and in the copies
of whole modules. Biases (`bias="all"`) it trains in place, and switching the adapter off leaves
them trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from forgetless.model.linear import unwrapped

# Parts of the names of biases that belong to an adapter.
OF_ADAPTERS = (".lora_", ".modules_to_save.")
_biases: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def remember_biases(model: nn.Module) -> None:
    """Keep a copy of the base's biases as they are now, unless there is one."""
    base = unwrapped(model)
    if base not in _biases:
        _biases[base] = {name: bias.detach().clone() for name, bias in named_biases(base)}


def base_biases(model: nn.Module) -> Mapping[str, Tensor]:
    """Name -> bias of the base as it was remembered; nothing where none was."""
    return _biases.get(unwrapped(model), {})


def trains_biases(model: Any) -> bool:
    """Whether an adapter of a model trains biases of its base."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return False
    return any(getattr(config, "bias", "none") not in ("none", None) for config in configs.values())


def named_biases(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the bare base, bias) of the base, below any adapter."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not any(part in name for part in OF_ADAPTERS):
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter
