"""A model looked at without its weights.

It is built on torch's meta device, where tensors have shapes and no storage. One forward pass there
tells which weights read the same input, and what autograd would keep for the backward pass, without
attention matrices, which fused attention does not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.importance.sizes import Planned
from forgetless.model.adapters import add_adapter
from forgetless.model.linear import unwrapped
from forgetless.model.loading import load_empty
from forgetless.model.targets import BaseLayer, base_layers
from forgetless.options.plan import PlanOptions

# Lengths of the pass on the meta device, of which the first that the model takes is used. They are
# prime, so that no width of a model is one, and a matrix of attention can be told by its shape.
PROBES = (131, 67, 31, 13)
# The length of the pass where the model takes none of these.
SHORTEST = 7


@dataclass(frozen=True)
class Sketch:
    """What the meta device tells of a model.

    weights         the target weights
    parameters      how many numbers the model has, of which `linear` in linear layers and the head
    blocks          how many blocks hold target weights
    width           of what goes from block to block
    vocabulary      how many tokens there are
    itemsize        bytes per parameter
    kept_bare       bytes per token that autograd keeps while recording without training
    kept_adapted    and while training
    lora            parameters of the adapter; 0 with full fine-tuning
    """

    weights: list[Planned]
    parameters: int
    linear: int
    blocks: int
    width: int
    vocabulary: int
    itemsize: int
    kept_bare: float
    kept_adapted: float
    lora: int

    @property
    def elements(self) -> int:
        """How many numbers the target weights have."""
        return sum(weight.shape[0] * weight.shape[1] for weight in self.weights)


def sketched(options: PlanOptions) -> Sketch:
    """The model on the meta device, looked at."""
    model = load_empty(options)
    base: Any = unwrapped(model)
    layers = base_layers(model, options.targets)
    longest = getattr(base.config, "max_position_embeddings", None) or 2048
    length = next((probe for probe in PROBES if probe < longest), SHORTEST)
    leaders = shared_inputs(base, layers, length)
    vocabulary, width = base.get_input_embeddings().weight.shape
    parameters = sum(p.numel() for p in base.parameters())
    itemsize = next(base.parameters()).element_size()
    linear = _linear_parameters(base)
    kept_bare = kept_per_token(base.requires_grad_(False), length, through_embeddings=True)
    trained, lora = _as_tuned(options, model, layers)
    return Sketch(
        weights=[Planned(layer.name, layer.shape, leaders[layer.name]) for layer in layers],
        parameters=parameters,
        linear=linear,
        blocks=len({_block(layer.name) for layer in layers}),
        width=width,
        vocabulary=vocabulary,
        itemsize=itemsize,
        kept_bare=kept_bare,
        kept_adapted=kept_per_token(trained, length),
        lora=lora,
    )


def _as_tuned(
    options: PlanOptions, model: nn.Module, layers: list[BaseLayer]
) -> tuple[nn.Module, int]:
    """The model as it is tuned, and how many parameters its adapter has."""
    if options.full:
        for layer in layers:
            layer.module.weight.requires_grad_(True)
        return unwrapped(model), 0
    with torch.device("meta"):
        adapted = add_adapter(model, names=options.targets, rank=options.rank, alpha=32.0)
    return adapted, sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _linear_parameters(base: Any) -> int:
    """Parameters that a token is multiplied by: of all linear layers and the head."""
    linear = sum(
        module.weight.numel()
        for module in base.modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    )
    head = base.get_output_embeddings()
    if head is not None and not isinstance(head, nn.Linear):
        linear += head.weight.numel()
    return linear


def _block(name: str) -> str:
    """The number of the block that a weight is in, as its name has it."""
    return name.split(".layers.")[-1].split(".h.")[-1].split(".")[0]


def shared_inputs(base: nn.Module, layers: list[BaseLayer], length: int) -> dict[str, str]:
    """Weight -> the first weight that reads the same tensor, as a recorder finds it."""
    inputs: dict[int, tuple[Tensor, str]] = {}  # tensors are held, so that identities stay apart
    leaders: dict[str, str] = {}

    def watch(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            leader = inputs.setdefault(id(args[0]), (args[0], name))[1]
            leaders.setdefault(name, leader)

        return see

    handles = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in layers]
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            base(input_ids=ids, use_cache=True)  # with a cache, no mask is looked into
    finally:
        for handle in handles:
            handle.remove()
    return {layer.name: leaders.get(layer.name, layer.name) for layer in layers}


def kept_per_token(model: nn.Module, length: int, *, through_embeddings: bool = False) -> float:
    """Bytes per token that autograd keeps from a forward pass with the loss.

    Parameters and attention matrices are not counted. `through_embeddings`: gradients start at the
    embeddings' output, as a recorder that observes has it.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        attention = tuple(tensor.shape[-2:]) == (length, length)
        if storage._cdata not in own and not attention:
            kept[storage._cdata] = storage
        return tensor

    def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True).clone()

    base: Any = unwrapped(model)
    handle = None
    if through_embeddings:
        handle = base.get_input_embeddings().register_forward_hook(start)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=True)
    if handle is not None:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values()) / length
