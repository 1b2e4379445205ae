"""Bytes per process while recording and while tuning, by what they are for.

Counted is what tensors take, without Python and the libraries. On one core with 16 million
parameters (benchmarks/plan.py) peaks are within 5 % where every tensor is given back at once;
glibc's heap, which keeps holes, makes it 1.4 to 1.7 times as much.
"""

from __future__ import annotations

from forgetless.importance.sizes import bytes_of_tensors, shares
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.plan import PlanOptions
from forgetless.plan.fits import sums_of
from forgetless.plan.sketch import Sketch

# Bytes per weight that bitsandbytes quantises: four or eight bits, and for NF4 a scale per block,
# which is quantised too.
QUANTISED_BYTES = {"4bit": 0.516, "8bit": 1.0}
# Bytes per trained parameter of an adapter, all in f32: itself, its gradient, two moments of AdamW.
TRAINED = 16


def recording_memory(options: PlanOptions, sketch: Sketch) -> dict[str, float]:
    """Bytes per process while recording, by what they are for."""
    estimator = ESTIMATORS[options.estimator]
    kept: float = 0
    inputs = 0
    if estimator.trains:
        kept = sketch.kept_adapted
    elif estimator.gradients:
        kept = sketch.kept_bare
        # The hooks keep the layers' inputs, each that several read once.
        columns = sum(weight.shape[1] for weight in sketch.weights if weight.leads)
        inputs = options.record_tokens * columns * sketch.itemsize
    return {
        "model": _model_bytes(options, sketch),
        "sums": sums_of(options, sketch.weights),
        "adapter": TRAINED * sketch.lora if estimator.trains else 0,
        "activations": _activations(options, sketch, kept, options.record_tokens) + inputs,
    }


def tuning_memory(options: PlanOptions, sketch: Sketch, tier: str) -> dict[str, float]:
    """Bytes per process while tuning, by what they are for.

    `trained`: the trained parameters with gradient and AdamW's two moments; of full fine-tuning
    without the parameters, which are the model's.
    """
    sharded = options.processes if options.engine == "fsdp" else 1
    states = TRAINED * sketch.lora
    if options.full:
        states = 3 * sketch.itemsize * sketch.elements
    by_process = shares(sketch.weights, tier, options.processes)
    return {
        "model": _model_bytes(options, sketch) / sharded,
        "trained": states / sharded,
        "importance": max(bytes_of_tensors(weights, tier) for weights in by_process),
        "activations": _activations(options, sketch, sketch.kept_adapted, options.tokens),
    }


def _model_bytes(options: PlanOptions, sketch: Sketch) -> float:
    """Bytes of the base: linear layers quantised where asked for, the rest then in f32, as PEFT
    prepares it.
    """
    if options.quantize == "none":
        return sketch.parameters * sketch.itemsize
    rest = sketch.parameters - sketch.linear
    return sketch.linear * QUANTISED_BYTES[options.quantize] + rest * 4


def _activations(options: PlanOptions, sketch: Sketch, kept: float, tokens: int) -> float:
    """What the backward pass needs, and the logits with their gradient.

    `kept`: bytes per token that autograd keeps without checkpointing; with it, the input of each
    block and what one block keeps.
    """
    logits = tokens * sketch.vocabulary * (sketch.itemsize + 4)
    if options.gradient_checkpointing:
        head = 4 * sketch.vocabulary
        inputs = sketch.blocks * sketch.width * sketch.itemsize
        kept = head + inputs + max(kept - head, 0) / max(sketch.blocks, 1)
    return tokens * kept + logits
