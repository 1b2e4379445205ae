"""The target weights of a model: those that are trained, and held.

Under a LoRA adapter they are the weights of the layers that carry it. In full fine-tuning they are
weights of linear layers, each with its base, which is what the weight is when the target is made.
What forgetless cannot hold is refused here, with the reason.

    for weight in target_weights(peft_model):
        weight.name, weight.update()       # see weights.py
    for layer in base_layers(model, "all-linear"): ...      # to record on, below any adapter
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from forgetless.model import shards
from forgetless.model.checkpoint import BaseWeight, KeptWeight, StoredWeight, stored_weights
from forgetless.model.linear import (
    FUSED_EXPERTS,
    LinearModule,
    base_shapes,
    fused_experts,
    is_conv1d,
    matching,
    place_of,
    unwrapped,
)
from forgetless.model.quantised import keep_differentiable
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight

logger = logging.getLogger("forgetless")
# How values of PEFT's init_lora_weights begin that change the base weight.
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def target_weights(
    model: nn.Module, *, names: str | None = None, subtract_initial: bool = False
) -> list[TargetWeight]:
    """The target weights of `model`, in the model's order.

    With LoRA layers these are the weights under the active adapter. Without, they are trained
    themselves, and the base is what they are now: those matched by `names` (see `matching`), by
    default all linear ones that require a gradient. `subtract_initial` accepts adapters that start
    away from the base (PiSSA, OLoRA, CorDA) and takes their product as it is now for the start;
    otherwise they are refused.

    Raises ValueError for what cannot be held: several active adapters, DoRA and other variants,
    merged adapters, fused experts, embeddings.
    """
    base = unwrapped(model)
    adapted = _low_rank_weights(base, model, subtract_initial)
    if adapted:
        _check_own(
            base,
            [(weight.name.removesuffix(".weight"), weight.base_layer()) for weight in adapted],
        )
        return list(adapted)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model has no LoRA layer that forgetless can hold (found "
            f"{adapter_types(model)}); use LoRA, or full fine-tuning without PEFT"
        )
    layers = matching(base, names) if names is not None else _trained_layers(base)
    return list(_full_weights(base, layers))


def adapter_types(model: Any) -> str:
    """PEFT's words for the adapters of a model, such as LORA or OFT."""
    kinds = {getattr(config, "peft_type", config) for config in model.peft_config.values()}
    return ", ".join(sorted(str(getattr(kind, "value", kind)) for kind in kinds))


def _low_rank_weights(
    base: nn.Module, model: nn.Module, subtract_initial: bool
) -> list[LowRankWeight]:
    """The weights under active LoRA adapters. Raises ValueError for layers that cannot be held."""
    from peft.tuners.lora import LoraLayer

    weights = []
    for path, module in base.named_modules():
        if isinstance(module, LoraLayer):
            active = _active_adapters(module)
            if active:
                _check_plain(path, module, active)
                weights.append(_low_rank_weight(path, module, active[0], model, subtract_initial))
    return weights


def _active_adapters(layer: Any) -> list[str]:
    """The active adapters that a LoRA layer has."""
    return [
        adapter
        for adapter in layer.active_adapters
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A or adapter in layer.lora_B
    ]


def _check_plain(path: str, layer: Any, active: list[str]) -> None:
    """Raise ValueError unless a LoRA layer's update is scale * B @ A, of one active adapter."""
    where = f"'{path}'"
    if type(layer).__name__ == "ParamWrapper":
        raise ValueError(f"{where}: {FUSED_EXPERTS}")
    if len(active) > 1:
        raise ValueError(
            f"{where} has {len(active)} active adapters ({', '.join(active)}); forgetless holds "
            "one: call model.set_adapter(name)"
        )
    adapter = active[0]
    if adapter not in layer.lora_A or not isinstance(layer.lora_A[adapter], nn.Linear):
        raise ValueError(
            f"{where} is a LoRA layer on {type(layer.get_base_layer()).__name__}; expected a "
            "linear layer: leave it out of target_modules"
        )
    if layer.merged:
        raise ValueError(
            f"{where} has its adapter merged into the base weight; call model.unmerge_adapter() "
            "first"
        )
    if layer.use_dora.get(adapter) or getattr(layer, "lora_variant", {}).get(adapter) is not None:
        raise ValueError(
            f"{where} uses DoRA or another LoRA variant, whose update is not scale * B @ A; use "
            "plain LoRA or rsLoRA"
        )


def _low_rank_weight(
    path: str, layer: Any, adapter: str, model: nn.Module, subtract_initial: bool
) -> LowRankWeight:
    A = layer.lora_A[adapter].weight
    B = layer.lora_B[adapter].weight
    initial = None
    if _moves_the_base(model, adapter):
        if not subtract_initial:
            raise ValueError(
                f"'{path}': the adapter starts away from the base model (init_lora_weights moves "
                "the base weight); importance belongs to the bare base. Use the default "
                "initialisation, or pass subtract_initial=True before training"
            )
        initial = (A.detach().clone(), B.detach().clone())
    block, kind = place_of(path)
    return LowRankWeight(
        name=path + ".weight",
        shape=(B.shape[0], A.shape[1]),
        layer=block,
        kind=kind,
        module=layer,
        A=A,
        B=B,
        scale=float(layer.scaling[adapter]),
        initial=initial,
        adapter=adapter,
    )


def moves_the_base(model: Any) -> bool:
    """Whether making one of a model's adapters changed the base weight."""
    configs = getattr(model, "peft_config", None) or {}
    return any(_moves_the_base(model, adapter) for adapter in configs)


def _moves_the_base(model: nn.Module, adapter: str) -> bool:
    """Whether making an adapter changed the base weight."""
    configs = getattr(model, "peft_config", {})
    if not isinstance(configs, dict):
        return False
    initialised = getattr(configs.get(adapter), "init_lora_weights", True)
    return isinstance(initialised, str) and initialised.lower().startswith(MOVES_THE_BASE)


def _check_own(model: nn.Module, layers: Sequence[tuple[str, LinearModule]]) -> None:
    """Raise ValueError where a layer's weight is another module's too.

    Of a weight that is tied, or shared by two layers, neither the gradient nor the update is the
    layer's.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for path, module in layers:
        own = f"{path}.weight"
        for other in owners.get(id(module.weight), []):
            if other != own:
                raise ValueError(
                    f"'{own}' and '{other}' are one parameter, whose gradient and update "
                    "belong to both; leave it out of the targets"
                )


def _trained_layers(base: nn.Module) -> list[tuple[str, LinearModule]]:
    """The linear layers that require a gradient. Raises ValueError where none does."""
    trained = [
        (path, module)
        for path, module in matching(base, "all-linear")
        if module.weight.requires_grad
    ]
    if not trained:
        raise ValueError(
            "the model has neither a LoRA layer nor a linear layer that requires a gradient; add "
            "an adapter, or unfreeze what you train"
        )
    for path in fused_experts(base):
        if base.get_parameter(path).requires_grad:
            raise ValueError(f"'{path}': {FUSED_EXPERTS}: freeze them, or name the targets")
    return trained


def _full_weights(model: nn.Module, layers: Sequence[tuple[str, LinearModule]]) -> list[FullWeight]:
    """Weights that are trained themselves, each with its base.

    The base is read from the checkpoint's file where it stands there as it is now, and else copied.
    """
    _check_own(model, layers)
    for path, module in layers:
        if not module.weight.is_floating_point():
            raise ValueError(
                f"'{path}' is quantised ({module.weight.dtype}) and cannot be trained itself; "
                "use LoRA"
            )
    weights = {path + ".weight": module.weight for path, module in layers}
    # Of weights that FSDP2 has sharded a process copies its own rows.
    readable = {name: W for name, W in weights.items() if not shards.is_sharded(W)}
    stored = stored_weights(model, readable)
    _log_bases(weights, stored)
    return [_full_weight(path, module, stored.get(path + ".weight")) for path, module in layers]


def _log_bases(weights: Mapping[str, Tensor], stored: dict[str, StoredWeight]) -> None:
    """Say where the bases of full fine-tuning are, and what copies of them cost."""
    copied = [name for name in weights if name not in stored]
    if not copied:
        logger.info(
            "base of %d weights is read from the checkpoint, a few rows at a time: no second "
            "copy in memory",
            len(weights),
        )
        return
    size = sum(weights[name].numel() * weights[name].element_size() for name in copied)
    logger.info(
        "base of %d of %d weights is kept as a copy, %.0f MiB (first '%s'): no safetensors "
        "file that the model was loaded from holds them as they are now",
        len(copied),
        len(weights),
        size / 2**20,
        copied[0],
    )


def _full_weight(path: str, module: LinearModule, stored: StoredWeight | None) -> FullWeight:
    W = module.weight
    transposed = is_conv1d(module)
    base: BaseWeight = stored or KeptWeight(shards.local(W).detach().clone())
    block, kind = place_of(path)
    return FullWeight(
        name=path + ".weight",
        shape=(W.shape[1], W.shape[0]) if transposed else (W.shape[0], W.shape[1]),
        layer=block,
        kind=kind,
        module=module,
        W=W,
        base=base,
        transposed=transposed,
    )


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """A linear layer of the bare base model, below any adapter."""

    name: str  # of its weight
    shape: tuple[int, int]  # (out, in)
    module: LinearModule


def base_layers(model: nn.Module, names: str) -> list[BaseLayer]:
    """The base layers chosen by `names` (see `matching`), with or without adapters around them.

    Raises ValueError where switching the adapters off would not give the bare base: merged
    adapters, or ones that moved the base weight; and where no gradient flows through a layer
    (quantised.py).
    """
    base = unwrapped(model)
    keep_differentiable(base)
    for path, module in base.named_modules():
        if getattr(module, "merged", False):
            raise ValueError(
                f"'{path}' has its adapter merged into the base weight; call "
                "model.unmerge_adapter() first"
            )
    wrapper = _peft_wrapper(model)
    for adapter in getattr(wrapper, "peft_config", None) or {}:
        if _moves_the_base(wrapper, adapter):
            raise ValueError(
                f"adapter '{adapter}' moved the base weight when it was made "
                "(init_lora_weights); importance belongs to the bare base: "
                "record on the model without the adapter"
            )
    shapes = base_shapes(model)
    layers = matching(base, names)
    _check_own(base, layers)
    return [
        BaseLayer(path + ".weight", shapes[path + ".weight"], module) for path, module in layers
    ]


def _peft_wrapper(model: Any) -> nn.Module:
    """The model inside DDP and torch.compile: PEFT's wrapper, where there is one."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model
