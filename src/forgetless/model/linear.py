"""The linear layers of a transformers model: what they are called, and which of them are chosen.

Names and shapes are those of the bare base model, whatever wraps it: DDP, torch.compile, PEFT. A
shape is always (out, in), also where the weight is stored transposed (GPT-2's Conv1D) or as codes.

    for path, module in matching(unwrapped(model), "q_proj,v_proj"): ...
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.errors import OptionError, nearest

logger = logging.getLogger("forgetless")

# An nn.Linear, a Conv1D of transformers or a quantised layer of bitsandbytes, each a module with a
# `weight`. torch's types know the attributes of nn.Module only as "tensor or module".
LinearModule = Any

# What errors say about the fused tensors of mixture models.
FUSED_EXPERTS = (
    "fused expert tensors of mixture models hold many weights in one (experts, ...) "
    "tensor; forgetless has no importance for them: leave them out of the targets"
)
# Layers of bitsandbytes, known by name so that it need not be installed.
QUANTISED = ("Linear4bit", "Linear8bitLt")


@dataclass(frozen=True)
class Place:
    """Where a target weight will be, before there is an adapter: for layer coefficients."""

    name: str
    layer: int | None
    kind: str


def unwrapped(model: Any) -> nn.Module:
    """The transformers model inside DDP, torch.compile and PEFT wrappers.

    LoRA layers stay in place, so module names are those of the base model.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def below_adapters(module: Any) -> Any:
    """The base model's module inside PEFT's wrappers of it; `module` itself where there is none."""
    while True:
        if hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        elif getattr(module, "original_module", None) is not None:
            module = module.original_module
        else:
            return module


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, which stores its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_layers(model: Any) -> Iterator[tuple[str, LinearModule]]:
    """(path, module) of every linear layer that can be a target, in the model's order.

    The output head is left out, as PEFT's all-linear does. Under an adapter this is the base layer
    inside it, with the path that it has in the bare model.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside: list[str] = []  # paths of adapter layers: what lies below them belongs to the adapter
    for path, module in model.named_modules():
        if inside and path.startswith(inside[-1]):
            continue
        inner = module
        if hasattr(module, "get_base_layer"):
            inside.append(path + ".")
            inner = module.get_base_layer()
        is_linear = (
            isinstance(inner, nn.Linear) or is_conv1d(inner) or type(inner).__name__ in QUANTISED
        )
        if is_linear and module is not head and inner is not head:
            yield path, inner


def matching(model: nn.Module, names: str) -> list[tuple[str, LinearModule]]:
    """(path, module) of the linear layers of a bare model that `names` choose.

    `names` is 'all-linear', comma-separated last parts of module paths ('q_proj,v_proj'), or a
    regular expression that matches the whole path. Of a model that also sees or hears, the first
    two choose among the layers that read text. Raises OptionError naming the nearest kind when
    nothing matches, ValueError for fused experts.
    """
    layers = list(linear_layers(model))
    read_text = [(path, module) for path, module in layers if not is_outside_text(model, path)]
    kinds = {_kind(path) for path, _ in layers}
    if names == "all-linear":
        chosen = read_text
    elif re.fullmatch(r"[\w, ]+", names):
        wanted = {name.strip() for name in names.split(",") if name.strip()}
        _check_kinds_exist(model, wanted, kinds)
        chosen = [(path, module) for path, module in read_text if _kind(path) in wanted]
    else:
        try:
            pattern = re.compile(names)
        except re.error as error:
            raise OptionError(f"--targets '{names}' is not a regular expression: {error}") from None
        chosen = [(path, module) for path, module in layers if pattern.fullmatch(path)]
    if not chosen:
        raise OptionError(
            f"--targets '{names}' matches no linear layer of the model; kinds: "
            f"{', '.join(sorted(kinds))}"
        )
    return chosen


def is_outside_text(model: Any, path: str) -> bool:
    """Whether a layer lies outside of the text model: in a vision or audio tower, or in what turns
    their output into tokens. Text alone never reaches it.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return False
    decoder = model.get_decoder()
    inner = next((name for name, module in model.named_modules() if module is decoder), "")
    return inner != "" and not path.startswith(inner + ".")


def _kind(path: str) -> str:
    """The last part of a module's path: 'q_proj'."""
    return path.rsplit(".", 1)[-1]


def _check_kinds_exist(model: nn.Module, wanted: set[str], kinds: set[str]) -> None:
    """Raise OptionError or ValueError for a kind of layer that the model does not have."""
    for name in sorted(wanted - kinds):
        if any(name in path for path in fused_experts(model)):
            raise ValueError(f"'{name}': {FUSED_EXPERTS}")
        raise OptionError(
            f"no linear layer of the model is called '{name}'; {nearest(name, kinds)}"
        )


def places_of(model: nn.Module, names: str) -> list[Place]:
    """The places that `names` choose in a bare model (see `matching`)."""
    return [Place(path + ".weight", *place_of(path)) for path, _ in matching(model, names)]


def place_of(path: str) -> tuple[int | None, str]:
    """(index of the transformer block, kind) of a layer.

    'model.layers.3.self_attn.q_proj' is at (3, 'q_proj').
    """
    index = re.search(r"\.(\d+)\.", path)
    return (int(index.group(1)) if index else None), _kind(path)


def base_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Base weight name -> (out, in) for every linear layer, below any adapter.

    Quantised layers say their shape by in_features and out_features.
    """
    shapes: dict[str, tuple[int, int]] = {}
    wrappers: list[str] = []  # paths of PEFT's wrappers: what lies below them is in them already
    modules: Iterator[tuple[str, Any]] = unwrapped(model).named_modules()
    for path, module in modules:
        if wrappers and path.startswith(wrappers[-1]):
            continue
        inner = below_adapters(module)
        if inner is not module:
            wrappers.append(path + ".")
        name = path + ".weight"
        if is_conv1d(inner):
            shapes[name] = (inner.weight.shape[1], inner.weight.shape[0])
        elif isinstance(inner, nn.Linear) or (
            hasattr(inner, "in_features") and hasattr(inner, "weight")
        ):
            shapes[name] = (inner.out_features, inner.in_features)
    return shapes


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the (experts, ...) tensors of a bare mixture model."""
    return [
        path
        for path, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in path
    ]


def warn_of_experts(model: nn.Module, names: str) -> None:
    """Say that 'all-linear' leaves fused experts out, and names and it layers that read no text, so
    that nobody takes them for trained.

    Of experts PEFT's all-linear does the same.
    """
    outside = [path for path, _ in linear_layers(model) if is_outside_text(model, path)]
    if outside and re.fullmatch(r"[\w, -]+", names):
        logger.info(
            "%d layers that read no text are left out (first '%s'): they are neither trained nor "
            "held; a regular expression can name them",
            len(outside),
            outside[0],
        )
    experts = fused_experts(model)
    if experts and names == "all-linear":
        logger.warning(
            "all-linear leaves out %d fused expert tensors (first '%s'): they are neither "
            "trained nor held",
            len(experts),
            experts[0],
        )
