"""TODO model.targets."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from forgetless.model import shards
from forgetless.model.checkpoint import KeptWeight, StoredWeight, stored_weights
from forgetless.model.linear import (
    FUSED_EXPERTS,
    base_shapes,
    fused_experts,
    is_conv1d,
    matching,
    place_of,
    unwrapped,
)
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight

logger = logging.getLogger("forgetless")
MOVES_THE_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # values of init_lora_weights that change the base weight


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
    found = [
        weight
        for path, module in base.named_modules()
        if (weight := _low_rank(path, module, model, subtract_initial)) is not None
    ]
    if found:
        _check_own(
            base,
            [
                (weight.name.removesuffix(".weight"), weight.module.get_base_layer())
                for weight in found
            ],
        )
        return list(found)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "the model has no LoRA layer that forgetless can hold (found "
            f"{adapter_types(model)}); use LoRA, or full fine-tuning without PEFT"
        )
    if names is not None:
        return _full(base, matching(base, names))
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
    loose = [path for path in fused_experts(base) if base.get_parameter(path).requires_grad]
    if loose:
        raise ValueError(f"'{loose[0]}': {FUSED_EXPERTS}: freeze them, or name the targets")
    return _full(base, trained)


def adapter_types(model: nn.Module) -> str:
    """PEFT's words for the adapters of a model, such as LORA or OFT."""
    kinds = {getattr(config, "peft_type", config) for config in model.peft_config.values()}
    return ", ".join(sorted(str(getattr(kind, "value", kind)) for kind in kinds))


def _low_rank(
    path: str, module: nn.Module, model: nn.Module, subtract_initial: bool
) -> LowRankWeight | None:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None
    active = [
        a
        for a in module.active_adapters
        if a in module.lora_A or a in module.lora_embedding_A or a in module.lora_B
    ]
    if not active:
        return None
    where = f"'{path}'"
    if type(module).__name__ == "ParamWrapper":
        raise ValueError(f"{where}: {FUSED_EXPERTS}")
    if len(active) > 1:
        raise ValueError(
            f"{where} has {len(active)} active adapters ({', '.join(active)}); forgetless holds "
            "one: call model.set_adapter(name)"
        )
    adapter = active[0]
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
        raise ValueError(
            f"{where} is a LoRA layer on {type(module.get_base_layer()).__name__}; expected a "
            "linear layer: leave it out of target_modules"
        )
    if module.merged:
        raise ValueError(
            f"{where} has its adapter merged into the base weight; call model.unmerge_adapter() "
            "first"
        )
    if module.use_dora.get(adapter) or getattr(module, "lora_variant", {}).get(adapter) is not None:
        raise ValueError(
            f"{where} uses DoRA or another LoRA variant, whose update is not scale * B @ A; use "
            "plain LoRA or rsLoRA"
        )
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    initial = None
    if _moves_the_base(model, adapter):
        if not subtract_initial:
            raise ValueError(
                f"{where}: the adapter starts away from the base model (init_lora_weights moves "
                "the base weight); importance "
                "belongs to the bare base. Use the default initialisation, or pass "
                "subtract_initial=True before training"
            )
        initial = (A.detach().clone(), B.detach().clone())
    return LowRankWeight(
        path + ".weight",
        (B.shape[0], A.shape[1]),
        *place_of(path),
        module,
        A,
        B,
        float(module.scaling[adapter]),
        initial,
        adapter,
    )


def _check_own(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError where a layer's weight is another module's too (tied, or shared by two
    layers): neither its gradient nor its update is the layer's.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    for path, module in layers:
        other = next(
            (name for name in owners.get(id(module.weight), []) if name != f"{path}.weight"), None
        )
        if other is not None:
            raise ValueError(
                f"'{path}.weight' and '{other}' are one parameter, whose gradient and update "
                "belong to both; leave it out of the targets"
            )


def _moves_the_base(model: nn.Module, adapter: str) -> bool:
    configs = getattr(model, "peft_config", {})
    how = (
        getattr(configs.get(adapter), "init_lora_weights", True)
        if isinstance(configs, dict)
        else True
    )
    return isinstance(how, str) and how.lower().startswith(MOVES_THE_BASE)


def _full(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[TargetWeight]:
    """Weights that are trained themselves, each with its base: in the checkpoint's file where it
    stands there as it is now, else copied.
    """
    _check_own(model, layers)
    for path, module in layers:
        if not module.weight.is_floating_point():
            raise ValueError(
                f"'{path}' is quantised ({module.weight.dtype}) and cannot be trained itself; "
                "use LoRA"
            )
    # Of weights that FSDP2 has sharded a process copies its own rows.
    stored = stored_weights(
        model,
        {
            path + ".weight": module.weight
            for path, module in layers
            if not shards.is_sharded(module.weight)
        },
    )
    copied = [path + ".weight" for path, _ in layers if path + ".weight" not in stored]
    if copied:
        size = sum(
            module.weight.numel() * module.weight.element_size()
            for path, module in layers
            if path + ".weight" not in stored
        )
        logger.info(
            "base of %d of %d weights is kept as a copy, %.0f MiB (first '%s'): no safetensors "
            "file that the model was loaded from holds them "
            "as they are now",
            len(copied),
            len(layers),
            size / 2**20,
            copied[0],
        )
    else:
        logger.info(
            "base of %d weights is read from the checkpoint, a few rows at a time: no second "
            "copy in memory",
            len(layers),
        )
    return [_full_weight(path, module, stored.get(path + ".weight")) for path, module in layers]


def _full_weight(path: str, module: nn.Module, stored: StoredWeight | None) -> FullWeight:
    W, transposed = module.weight, is_conv1d(module)
    shape = (W.shape[1], W.shape[0]) if transposed else (W.shape[0], W.shape[1])
    return FullWeight(
        path + ".weight",
        shape,
        *place_of(path),
        module,
        W,
        stored or KeptWeight(shards.local(W).detach().clone()),
        transposed,
    )


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """A linear layer of the bare base model, below any adapter."""

    name: str  # of its weight
    shape: tuple[int, int]  # (out, in)
    module: nn.Module


def base_layers(model: nn.Module, names: str) -> list[BaseLayer]:
    """The base layers chosen by `names` (see `matching`), with or without adapters around them.

    Raises ValueError where switching the adapters off would not give the bare base: merged
    adapters, or ones that moved the base weight.
    """
    base = unwrapped(model)
    for path, module in base.named_modules():
        if getattr(module, "merged", False):
            raise ValueError(
                f"'{path}' has its adapter merged into the base weight; call "
                "model.unmerge_adapter() first"
            )
    for adapter in getattr(_wrapper(model), "peft_config", None) or {}:
        if _moves_the_base(_wrapper(model), adapter):
            raise ValueError(
                f"adapter '{adapter}' moved the base weight when it was made "
                "(init_lora_weights); importance belongs to the bare base: "
                "record on the model without the adapter"
            )
    shapes, layers = base_shapes(model), matching(base, names)
    _check_own(base, layers)
    return [
        BaseLayer(path + ".weight", shapes[path + ".weight"], module) for path, module in layers
    ]


def _wrapper(model: nn.Module) -> nn.Module:
    """The PEFT wrapper inside DDP and torch.compile, where there is one."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model
