"""Which linear layers a transformers model has, what they are called, and which are chosen.

Names and shapes are those of the bare base model, whatever wraps it: DDP, torch.compile, PEFT. A
shape is always (out, in), also where the weight is stored transposed (GPT-2's Conv1D) or as codes.

    for path, module in matching(unwrapped(model), "q_proj,v_proj"): ...
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from forgetless.errors import OptionError, nearest

logger = logging.getLogger("forgetless")
# What an error says of the fused tensors of mixture models.
FUSED_EXPERTS = (
    "fused expert tensors of mixture models hold many weights in one (experts, ...) "
    "tensor; forgetless has no importance for them: leave them out of the targets"
)


@dataclass(frozen=True)
class Place:
    """Where a target weight will be, before there is an adapter: what layer coefficients need to
    know.
    """

    name: str
    layer: int | None
    kind: str


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile and PEFT wrappers; LoRA layers stay in
    place, so module names are those of the base model.
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


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every linear layer that can be a target, in the model's order; the output
    head is left out, as PEFT's all-linear does.

    Under an adapter this is the base layer inside it, with the path that it has in the bare model.
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
            isinstance(inner, nn.Linear)
            or is_conv1d(inner)
            or type(inner).__name__ in ("Linear4bit", "Linear8bitLt")
        )
        if is_linear and module is not head and inner is not head:
            yield path, inner


def matching(model: nn.Module, names: str) -> list[tuple[str, nn.Module]]:
    """Linear layers of a bare model chosen by `names`:

    'all-linear', comma-separated last parts of module paths ('q_proj,v_proj'), or a regular
    expression that matches the whole path. Raises OptionError naming the nearest kind when nothing
    matches, ValueError for fused experts.
    """
    layers = list(linear_layers(model))
    kinds = {path.rsplit(".", 1)[-1] for path, _ in layers}
    if names == "all-linear":
        chosen = layers
    elif re.fullmatch(r"[\w, ]+", names):
        wanted = {name.strip() for name in names.split(",") if name.strip()}
        for name in sorted(wanted - kinds):
            if any(name in path for path in fused_experts(model)):
                raise ValueError(f"'{name}': {FUSED_EXPERTS}")
            raise OptionError(
                f"no linear layer of the model is called '{name}'; {nearest(name, kinds)}"
            )
        chosen = [(path, module) for path, module in layers if path.rsplit(".", 1)[-1] in wanted]
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


def placed(model: nn.Module, names: str) -> list[Place]:
    """The places that `names` choose in a bare model (see `matching`)."""
    return [Place(path + ".weight", *place_of(path)) for path, _ in matching(model, names)]


def place_of(path: str) -> tuple[int | None, str]:
    """(index of the transformer block, kind): 'model.layers.3.self_attn.q_proj' -> (3, 'q_proj')."""
    index = re.search(r"\.(\d+)\.", path)
    return (int(index.group(1)) if index else None), path.rsplit(".", 1)[-1]


def base_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Base weight name -> (out, in) for every linear layer, below any adapter; quantised layers say
    their shape by in_features and out_features.
    """
    shapes = {}
    for path, module in unwrapped(model).named_modules():
        inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if is_conv1d(inner):
            shapes[path + ".weight"] = (inner.weight.shape[1], inner.weight.shape[0])
        elif isinstance(inner, nn.Linear) or (
            hasattr(inner, "in_features") and hasattr(inner, "weight")
        ):
            shapes[path + ".weight"] = (inner.out_features, inner.in_features)
    return {
        name: shape
        for name, shape in shapes.items()
        if ".lora_" not in name and ".base_layer." not in name
    }


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the (experts, ...) tensors of a bare mixture model."""
    return [
        path
        for path, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in path
    ]


def warn_of_experts(model: nn.Module, names: str) -> None:
    """Say that 'all-linear' leaves fused experts out, as PEFT's does, so that nobody takes them for
    trained.
    """
    experts = fused_experts(model)
    if experts and names == "all-linear":
        logger.warning(
            "all-linear leaves out %d fused expert tensors (first '%s'): they are neither "
            "trained nor held",
            len(experts),
            experts[0],
        )
