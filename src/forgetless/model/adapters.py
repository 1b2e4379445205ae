"""PEFT adapters around a model: put on, switched off, taken out, and looked into.

For example:

    model = add_adapter(base, names="all-linear", rank=8, alpha=16)
    with bare(model) as base: ...           # measure the base model below the adapter
    base = without_adapter(model)
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from forgetless.errors import FileError
from forgetless.model.base_values import base_biases, named_biases
from forgetless.model.linear import is_conv1d, linear_layers, matching, unwrapped, warn_of_experts
from forgetless.options.model import AdapterOptions

logger = logging.getLogger("forgetless")


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers model with its adapters switched off, in eval mode and frozen.

    On leaving, everything is as it was before.
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
    trained = _swapped_biases(base)
    try:
        for module in adapters:
            module.enable_adapters(False)
        base.requires_grad_(False)
        yield base.eval()
    finally:
        for parameter, bias in trained:
            parameter.data.copy_(bias)
        for module in adapters:
            # This also unfreezes the adapter, so the parameters' flags are put back after it.
            module.enable_adapters(True)
        for module, was in training.items():
            module.training = was
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)


def _swapped_biases(base: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(bias, what an adapter made of it), each now as the base had it; of adapters that train
    biases of the base, which no switch of PEFT's takes back.
    """
    trained: list[tuple[Tensor, Tensor]] = []
    before = base_biases(base)
    if before:
        for name, parameter in named_biases(base):
            trained.append((parameter, parameter.detach().clone()))
            parameter.data.copy_(before[name])
    return trained


def without_adapter(model: Any) -> nn.Module:
    """What `add_adapter` was given, with the adapter taken out of it again."""
    base: nn.Module = model.unload()
    return base


def forget_adapters(model: Any) -> None:
    """Take PEFT's note of its adapters off a model from which they were taken or merged.

    Otherwise PEFT would take the next adapter for a second one.
    """
    if hasattr(model, "peft_config"):
        del model.peft_config


def peft_targets(model: nn.Module, names: str) -> tuple[list[str], bool]:
    """(target_modules for a PEFT configuration, whether some store their weight transposed).

    They are for the layers of a bare model that `names` choose (see `linear.matching`).
    """
    layers = matching(model, names)
    warn_of_experts(model, names)
    paths = [path for path, _ in layers]
    kinds = {path.rsplit(".", 1)[-1] for path in paths}
    of_these_kinds = {path for path, _ in linear_layers(model) if path.rsplit(".", 1)[-1] in kinds}
    modules = sorted(kinds) if of_these_kinds == set(paths) else paths
    return modules, any(is_conv1d(module) for _, module in layers)


def adapter_of(model: nn.Module, options: AdapterOptions) -> nn.Module:
    """`model` with the fresh LoRA adapter that the options describe."""
    return add_adapter(
        model,
        names=options.targets,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        rslora=options.rslora,
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
    settings: dict[str, Any] = dict(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        fan_in_fan_out=conv1d,
    )
    adapted: Any = get_peft_model(model, LoraConfig(**settings, target_modules=modules))
    if not _has_adapted_experts(adapted):
        return adapted
    kept = _without_names_of_experts(adapted, modules)
    base = without_adapter(adapted)
    forget_adapters(base)
    return get_peft_model(base, LoraConfig(**settings, target_modules=kept))


def _has_adapted_experts(model: nn.Module) -> bool:
    """Whether an adapter is on the fused experts of a mixture."""
    return any(type(module).__name__ == "ParamWrapper" for module in model.modules())


def _without_names_of_experts(adapted: nn.Module, modules: list[str]) -> list[str]:
    """The names of layers that PEFT does not take for those of experts.

    Of some mixtures (DeepSeek, Qwen 3 Next) it takes 'gate_proj' and the like for what the experts'
    layers were called in earlier versions of transformers, adapts the fused experts, and leaves the
    layers of that name (shared experts, dense blocks) alone. Raises ValueError where nothing else
    was asked for.
    """
    from peft.tuners.lora import LoraLayer

    done = [
        path for path, module in unwrapped(adapted).named_modules() if isinstance(module, LoraLayer)
    ]
    kept = [name for name in modules if any(f".{path}".endswith(f".{name}") for path in done)]
    left = sorted(set(modules) - set(kept))
    if not kept:
        raise ValueError(
            f"PEFT takes {', '.join(left)} for layers of this model's experts, which are fused; "
            "tune its attention, as --targets q_proj,k_proj,v_proj,o_proj or what its layers are "
            "called"
        )
    logger.warning(
        "%s: left out, since PEFT takes these names for those of the fused experts; such layers "
        "are neither trained nor held",
        ", ".join(left),
    )
    return kept


def adapter_inputs(folder: str | Path) -> dict[str, Tensor]:
    """Base weight name -> A (r, in) of the LoRA adapter in a folder, read without a model.

    Raises FileError where its file is not there or not whole, ValueError where it is not LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    inputs: dict[str, Tensor] = {}
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
            inputs[path + ".weight"] = value
    if not inputs:
        raise ValueError(
            f"'{folder}' holds no LoRA adapter: expected lora_A weights in it; give an adapter "
            "trained by LoRA"
        )
    return inputs


def active_lora_layers(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(LoRA layer of any kind, its active adapter) of a model; its `scaling` is by adapter."""
    from peft.tuners.lora import LoraLayer

    for module in unwrapped(model).modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.scaling:
                    yield module, adapter


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter around a model, of any kind."""
    return hasattr(model, "peft_config")


def has_lora(model: nn.Module) -> bool:
    """Whether an adapter's update is plain LoRA's, of any kind of layer."""
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in unwrapped(model).modules())
