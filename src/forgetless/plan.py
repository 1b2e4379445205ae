"""plan(): what recording and tuning will take, from a model's configuration alone: bytes of the
file, memory per process, time per step. No weights are read.

The model is built on torch's meta device, where tensors have shapes and no storage. One forward
pass there tells which weights read the same input, and what autograd would keep for the backward
pass (without attention matrices, which fused attention does not keep). With N the weights of all
linear layers and the head, T tokens of sequences of length S, h the width and L the blocks:

    forward pass      2 N T + 2 S h T L                     (causal attention: half of 4 S h)
    backward pass     the same for the inputs; with --full also 2 T for each trained weight; LoRA's
                      factors: 6 T each, forward pass included
    recording         the forward pass, the same backward (none for activation); kronecker adds 2 T
                      (out^2 + in^2), fisher and path 2 T out in
    pull              importance/sizes.py, once per optimizer step

Time is operations / rate: the rate of a product like the model's, and that of a real pull on one
weight, both measured once on this machine, or `--flops`. Memory is what tensors take, without
Python and the libraries. On one core with 16 million parameters (benchmarks/plan.py) files are
within 1 % and peaks of memory within 5 % where every tensor is given back at once; glibc's heap,
which keeps holes, makes it 1.4 to 1.7 times as much. Times were 1.2 to 2.1 times what is planned,
since a step is more than its products: a lower bound.

    forgetless plan meta-llama/Llama-3.1-8B --tier kronecker:16 --processes 4 --flops 400e12
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance
from forgetless.importance.entries import DenseEntry, Entry, FactoredEntry, KroneckerEntry
from forgetless.importance.sizes import (
    Planned,
    bytes_of_file,
    bytes_of_tensors,
    pull_operations,
    shares,
    total,
    usual_tiers,
)
from forgetless.importance.tiers import converted, parse_tier
from forgetless.model.adapters import add_adapter
from forgetless.model.linear import unwrapped
from forgetless.model.loading import device_of, load_empty
from forgetless.model.targets import BaseLayer, base_layers
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.plan import PlanOptions
from forgetless.penalty.algebra import low_rank_pull
from forgetless.report import numbers

PROBES = (
    131,
    67,
    31,
    13,
)  # lengths of the pass on the meta device: prime, so that no width of a model is one
NF4, INT8 = 0.516, 1.0  # bytes per quantised weight


@dataclass(frozen=True)
class Sketch:
    """What the meta device tells of a model."""

    weights: list[Planned]
    parameters: int
    linear: int  # of them, in linear layers, the head included
    blocks: int
    width: int
    vocabulary: int
    itemsize: int  # bytes per parameter
    kept_bare: float  # bytes per token that autograd keeps while recording
    kept_adapted: float  # and while tuning
    lora: int  # parameters of the adapter


def plan(options: PlanOptions) -> dict[str, Any]:
    """Print the plan and return it. Raises OptionError for a tier that the estimator cannot have."""
    tiers = usual_tiers(options.estimator, options.cov_rank)
    tier = options.tier or tiers[0]
    estimator = ESTIMATORS[options.estimator]
    if parse_tier(tier)[0] == "kronecker" and estimator.tier != "kronecker":
        raise OptionError(
            f"--tier {tier} needs --estimator kronecker, found --estimator {options.estimator}"
        )
    sketch = sketched(options)
    anchor = options.rank if estimator.trains else None
    files = {
        name: bytes_of_file(sketch.weights, name, estimator=options.estimator, anchor_rank=anchor)
        for name in dict.fromkeys([tier, *tiers])
    }
    rates = (
        {"source": "given", "step": options.flops, "pull": options.flops}
        if options.flops
        else measured_rates(options, sketch, tier)
    )
    work = operations(options, sketch, tier)
    found = {
        "model": options.model,
        "targets": options.targets,
        "weights": len(sketch.weights),
        "general_tokens": options.general_tokens,
        "elements": sum(w.shape[0] * w.shape[1] for w in sketch.weights),
        "parameters": sketch.parameters,
        "trained_parameters": _trained(options, sketch),
        "estimator": options.estimator,
        "tier": tier,
        "files": files,
        "processes": options.processes,
        "engine": options.engine,
        "memory": {
            "recording": recording_memory(options, sketch),
            "tuning": tuning_memory(options, sketch, tier),
        },
        "operations": work,
        "rates": rates,
        "seconds": seconds(work, rates, options),
    }
    print(json.dumps(found, indent=1) if options.json else text(found, options))
    return found


def sketched(options: PlanOptions) -> Sketch:
    """The model on the meta device, looked at."""
    model = load_empty(options)
    base: Any = unwrapped(model)
    layers = base_layers(model, options.targets)
    length = next(
        (n for n in PROBES if n < (getattr(base.config, "max_position_embeddings", None) or 2048)),
        7,
    )
    leaders = shared_inputs(base, layers, length)
    weights = [Planned(layer.name, layer.shape, leaders[layer.name]) for layer in layers]
    head = base.get_output_embeddings()
    linear = sum(
        m.weight.numel()
        for m in base.modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    )
    linear += head.weight.numel() if head is not None and not isinstance(head, nn.Linear) else 0
    facts = dict(
        weights=weights,
        parameters=sum(p.numel() for p in base.parameters()),
        linear=linear,
        width=base.get_input_embeddings().weight.shape[1],
        blocks=len(
            {weight.name.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for weight in weights}
        ),
        vocabulary=base.get_input_embeddings().weight.shape[0],
        itemsize=next(base.parameters()).element_size(),
    )
    bare = kept_per_token(base.requires_grad_(False), length, through_embeddings=True)
    if options.full:
        for layer in layers:
            layer.module.weight.requires_grad_(True)
        return Sketch(**facts, kept_bare=bare, kept_adapted=kept_per_token(base, length), lora=0)  # type: ignore[arg-type]
    with torch.device("meta"):
        adapted = add_adapter(model, names=options.targets, rank=options.rank, alpha=32.0)
    lora = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Sketch(**facts, kept_bare=bare, kept_adapted=kept_per_token(adapted, length), lora=lora)  # type: ignore[arg-type]


def shared_inputs(base: nn.Module, layers: list[BaseLayer], length: int) -> dict[str, str]:
    """Weight -> the first weight that reads the same tensor, as a recorder finds it."""
    inputs: dict[int, tuple[Tensor, str]] = {}  # held, so that identities stay apart
    leaders: dict[str, str] = {}
    watch = lambda name: (
        lambda _, args: (
            leaders.setdefault(name, inputs.setdefault(id(args[0]), (args[0], name))[1]) and None
        )
    )
    handles = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            base(
                input_ids=torch.zeros(1, length, dtype=torch.long, device="meta"), use_cache=True
            )  # with a cache, no mask is looked into
    finally:
        for handle in handles:
            handle.remove()
    return {layer.name: leaders.get(layer.name, layer.name) for layer in layers}


def kept_per_token(model: nn.Module, length: int, *, through_embeddings: bool = False) -> float:
    """Bytes per token that autograd keeps from a forward pass with the loss; parameters and
    attention matrices are not counted.
    """
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own and tuple(tensor.shape[-2:]) != (
            length,
            length,
        ):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    start = lambda module, args, output: output.detach().requires_grad_(True).clone()
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


def _trained(options: PlanOptions, sketch: Sketch) -> int:
    return sum(w.shape[0] * w.shape[1] for w in sketch.weights) if options.full else sketch.lora


def _model_bytes(options: PlanOptions, sketch: Sketch) -> float:
    if options.quantize == "none":
        return sketch.parameters * sketch.itemsize
    return (
        sketch.linear * (NF4 if options.quantize == "4bit" else INT8)
        + (sketch.parameters - sketch.linear) * 4
    )  # the rest in f32, as PEFT prepares it


def _activations(options: PlanOptions, sketch: Sketch, kept: float, tokens: int) -> float:
    """What the backward pass needs, and the logits with their gradient."""
    logits = tokens * sketch.vocabulary * (sketch.itemsize + 4)
    if options.gradient_checkpointing:
        head = 4 * sketch.vocabulary
        kept = (
            head
            + sketch.blocks * sketch.width * sketch.itemsize
            + max(kept - head, 0) / max(sketch.blocks, 1)
        )
    return tokens * kept + logits


def recording_memory(options: PlanOptions, sketch: Sketch) -> dict[str, float]:
    """Bytes per process while recording, by what they are for."""
    estimator = ESTIMATORS[options.estimator]
    elements = sum(w.shape[0] * w.shape[1] for w in sketch.weights)
    inputs = sum(w.shape[1] for w in sketch.weights if w.leads)
    sums = bytes_of_tensors(sketch.weights, estimator.tier)
    if estimator.tier == "f32":  # credits, and of a path the importance of the epochs before
        sums = (8 if estimator.trains else 4) * elements
    kept: float = 0
    if estimator.trains:
        kept = sketch.kept_adapted
    elif estimator.gradients:
        kept = sketch.kept_bare
    held = (
        options.record_tokens * inputs * sketch.itemsize if kept and not estimator.trains else 0
    )  # what the hooks keep of the layers' inputs
    return {
        "model": _model_bytes(options, sketch),
        "sums": sums,
        "adapter": 16 * sketch.lora if estimator.trains else 0,
        "activations": _activations(options, sketch, kept, options.record_tokens) + held,
    }


def tuning_memory(options: PlanOptions, sketch: Sketch, tier: str) -> dict[str, float]:
    """Bytes per process while tuning, by what they are for: the trained parameters with gradient
    and AdamW's two moments.
    """
    n = options.processes if options.engine == "fsdp" else 1
    trained = _trained(options, sketch)
    states = 3 * sketch.itemsize * trained if options.full else 16 * trained
    return {
        "model": _model_bytes(options, sketch) / n,
        "trained": states / n,
        "importance": max(
            bytes_of_tensors(mine, tier) for mine in shares(sketch.weights, tier, options.processes)
        ),
        "activations": _activations(options, sketch, sketch.kept_adapted, options.tokens),
    }


def operations(options: PlanOptions, sketch: Sketch, tier: str) -> dict[str, float]:
    """Floating-point operations: of an optimizer step without the pull and of the pull, per
    process; of recording, of all processes together.
    """
    attention = 2.0 * options.length * sketch.width * sketch.blocks
    forward = 2.0 * sketch.linear + attention  # per token
    elements = sum(w.shape[0] * w.shape[1] for w in sketch.weights)
    own = 2.0 * elements if options.full else 6.0 * sketch.lora
    step = (
        (2 * forward + own + (forward if options.gradient_checkpointing else 0))
        * options.tokens
        * options.accumulation
    )
    mine = shares(sketch.weights, tier, options.processes)
    pull = max(
        sum(pull_operations(w, tier, rank=options.rank, full=options.full) for w in part)
        for part in mine
    )
    estimator = ESTIMATORS[options.estimator]
    sums = 2.0 * sum(w.shape[0] ** 2 + (w.shape[1] ** 2 if w.leads else 0) for w in sketch.weights)
    more = {"kronecker": sums, "f32": 2.0 * elements}.get(estimator.tier, 0.0)
    passes = 2 if estimator.gradients else 1
    return {
        "step": step,
        "pull": pull,
        "recording": 0.0
        if estimator.constant
        else (passes * forward + more) * options.general_tokens,
    }


def seconds(
    work: dict[str, float], rates: dict[str, Any], options: PlanOptions
) -> dict[str, float]:
    """Operations / rate."""
    step, pull = work["step"] / rates["step"], work["pull"] / rates["pull"]
    return {
        "step": step,
        "pull": pull,
        "share": pull / step,
        "recording": work["recording"] / rates["step"] / options.processes,
    }


def measured_rates(options: PlanOptions, sketch: Sketch, tier: str) -> dict[str, Any]:
    """Operations per second here: of a product like the model's, and of the pull on the commonest
    weight, cut to at most 2048 x 2048.
    """
    device, dtype = (
        device_of(options),
        {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[sketch.itemsize],
    )
    (out, into), _ = Counter(w.shape for w in sketch.weights).most_common(1)[0]
    # Few rows: a call that is over before the machine turns to something else.
    x, W = (
        torch.randn(min(options.tokens, 256), into, dtype=dtype, device=device),
        torch.randn(into, out, dtype=dtype, device=device),
    )
    small = Planned("", (min(out, 2048), min(into, 2048)), "")
    A, B = (
        torch.randn(options.rank, small.shape[1], device=device),
        torch.randn(small.shape[0], options.rank, device=device),
    )
    entry = _entry(small, tier, device)
    pull = lambda: low_rank_pull(A, B, 1.0, entry, B, A, 1.0)
    return {
        "source": f"measured on {device}",
        "step": 2 * x.shape[0] * into * out / _fastest(lambda: x @ W, device),
        "pull": pull_operations(small, tier, rank=options.rank, full=False)
        / _fastest(pull, device),
    }


def _entry(weight: Planned, tier: str, device: torch.device) -> Entry:
    kind, k = parse_tier(tier)
    out, into = weight.shape
    if kind == "factored":
        return FactoredEntry(
            torch.rand(out, k or 1, device=device), torch.rand(into, k or 1, device=device)
        )
    if kind == "kronecker":
        return KroneckerEntry(_covariance(out, k, device), _covariance(into, k, device))
    entry: Entry = DenseEntry(torch.rand(out, into))
    return converted({"": entry}, kind)[""].to(device, torch.float32, {})


def _covariance(n: int, rank: int | None, device: torch.device) -> AnyCovariance:
    if rank is None:
        return Covariance(
            torch.eye(n, device=device)
        )  # a product takes as long whatever the numbers
    k = min(rank, n)
    return LowRankCovariance(
        torch.randn(n, k, device=device),
        torch.rand(k, device=device),
        torch.tensor(0.1, device=device),
    )


def _fastest(call: Any, device: torch.device, *, budget: float = 0.3) -> float:
    """Seconds of the fastest of several calls: what others do on the machine only slows."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget or best == float("inf"):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def text(found: dict[str, Any], options: PlanOptions) -> str:
    """The plan for people."""
    share = {name: size / (4 * found["parameters"]) for name, size in found["files"].items()}
    n = (
        ""
        if options.processes == 1
        else (
            f" per process ({options.processes}, {options.engine}; importance shared out by weight)"
        )
    )
    work, spent, rates = found["operations"], found["seconds"], found["rates"]
    lines = [
        f"{found['model']}: {found['parameters']:,} parameters; {found['weights']} target "
        f"weights with {found['elements']:,} elements "
        f"({found['targets']}); {found['trained_parameters']:,} trained",
        "",
        f"importance file, {found['estimator']}:",
    ]
    lines += [
        f"  {name:<14}{numbers.byte_size(size):>11}  {100 * share[name]:8.3f} % of the model in "
        f"f32{'   <- tuned with' if name == found['tier'] else ''}"
        for name, size in found["files"].items()
    ]
    for what, tokens in (("recording", options.record_tokens), ("tuning", options.tokens)):
        parts = found["memory"][what]
        lines += [
            "",
            f"memory while {what}{n}, {tokens:,} tokens per forward pass: "
            f"{numbers.byte_size(total(parts))}",
            "  "
            + ", ".join(
                f"{key} {numbers.byte_size(value)}" for key, value in parts.items() if value
            ),
        ]
    tokens = found["general_tokens"]
    lines += [
        "",
        "memory is what tensors take (an allocator's holes and libraries come on top); time is a "
        "lower bound: all that is no product comes on top",
    ]
    lines += [
        "",
        f"time, at {rates['step']:.3g} operations per second for the model and "
        f"{rates['pull']:.3g} for the pull ({rates['source']}):",
        f"  optimizer step  {work['step']:.3g} operations, {numbers.duration(spent['step'])} "
        f"({options.accumulation} x {options.tokens:,} tokens)",
        f"  pull            {work['pull']:.3g} operations, {1e3 * spent['pull']:.3g} ms: "
        f"{100 * spent['share']:.2g} % of the step",
        f"  recording       {work['recording']:.3g} operations, "
        f"{numbers.duration(spent['recording'])} for {tokens:,} tokens",
    ]
    return "\n".join(lines)
