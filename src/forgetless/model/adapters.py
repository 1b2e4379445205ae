"""TODO model.adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from forgetless.errors import FileError
from forgetless.model.linear import is_conv1d, linear_layers, matching, unwrapped, warn_of_experts


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers model with its adapters switched off, in eval mode, with every parameter
    frozen; all of it as before on leaving.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = unwrapped(model)
    training = {module: module.training for module in base.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in base.parameters()}
    adapters = [
        module
        for module in base.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        and not module.disable_adapters
    ]
    try:
        for module in adapters:
            module.enable_adapters(False)
        base.requires_grad_(False)
        yield base.eval()
    finally:
        for module in adapters:
            module.enable_adapters(
                True
            )  # also unfreezes the adapter, so flags are put back after it
        for module, was in training.items():
            module.training = was
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)


def without_adapter(model: nn.Module) -> nn.Module:
    """What `add_adapter` was given, with the adapter taken out of it again."""
    return model.unload()  # type: ignore[operator,no-any-return]


def peft_targets(model: nn.Module, names: str) -> tuple[list[str], bool]:
    """(target_modules for a PEFT configuration, whether some of them store their weight transposed)
    for the layers of a bare model chosen by `names`.
    """
    paths = [path for path, _ in matching(model, names)]
    warn_of_experts(model, names)
    kinds = {path.rsplit(".", 1)[-1] for path in paths}
    by_kind = {path for path, _ in linear_layers(model) if path.rsplit(".", 1)[-1] in kinds}
    return sorted(kinds) if by_kind == set(paths) else paths, any(
        is_conv1d(module) for _, module in matching(model, names)
    )


def add_adapter(
    model: nn.Module,
    *,
    names: str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
) -> nn.Module:
    """`model` wrapped by PEFT with a fresh LoRA adapter (U = 0) on the layers chosen by `names`."""
    from peft import LoraConfig, get_peft_model

    modules, conv1d = peft_targets(model, names)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=modules,
        task_type="CAUSAL_LM",
        fan_in_fan_out=conv1d,
    )
    return get_peft_model(model, config)


def adapter_inputs(folder: str | Path) -> dict[str, Tensor]:
    """Base weight name -> A (r, in) of a LoRA adapter's folder, read from its file without a model.

    Raises ValueError where there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = {}
    try:
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"'{folder}' has no whole adapter_model.safetensors ({error}); give the folder of an "
            "adapter that PEFT saved"
        ) from None
    for key, value in tensors.items():
        path, mark, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        if mark:
            found[path + ".weight"] = value
    if not found:
        raise ValueError(
            f"'{folder}' holds no LoRA adapter: expected lora_A weights in it; give an adapter "
            "trained by LoRA"
        )
    return found


def active_lora_layers(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(LoRA layer of any kind, its active adapter) of a model; its `scaling` is by adapter."""
    from peft.tuners.lora import LoraLayer

    for module in unwrapped(model).modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.scaling:
                    yield module, adapter


def has_lora(model: nn.Module) -> bool:
    """Whether an adapter's update is plain LoRA's, of any kind of layer."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in unwrapped(model).modules())
