"""Operations of an optimizer step, of the pull and of recording, and how long they take here.

With N the weights of all linear layers and the head, T tokens of sequences of length S, h the width
and L the blocks:

    forward pass      2 N T + 2 S h T L     (causal attention: half of 4 S h)
    backward pass     the same for the inputs; with --full also 2 T for each trained weight; LoRA's
                      factors take 6 T each, forward pass included
    recording         the forward pass and the same backward pass (activation needs none); kronecker
                      adds 2 T (out^2 + in^2), or 4 w T (out + in) where w directions are tracked,
                      fisher and path 2 T out in
    pull              importance/sizes.py, once per optimizer step

Time is operations / rate: the rate of a product like the model's, and that of a real pull on one
weight, both measured once on this machine, or `--flops`. It is a lower bound, since a step is more
than its products: it took 1.2 to 2.1 times as long in benchmarks/plan.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance
from forgetless.importance.entries import DenseEntry, Entry, FactoredEntry, KroneckerEntry
from forgetless.importance.sizes import Planned, pull_operations, shares
from forgetless.importance.tiers import converted, parse_tier
from forgetless.model.loading import device_of
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.plan import PlanOptions
from forgetless.penalty.algebra import low_rank_pull
from forgetless.plan.fits import summed_of
from forgetless.plan.sketch import Sketch

# Rows of the product whose rate is measured: few, so that a call is over before the machine turns
# to something else.
PRODUCT_ROWS = 256
# The weight whose pull is measured is cut to this many rows and columns, so that it takes no room.
LARGEST_PULLED = 2048
DTYPES_BY_SIZE = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@dataclass(frozen=True)
class Operations:
    """Floating-point operations: of an optimizer step without the pull and of the pull, per
    process; of recording, of all processes together.
    """

    step: float
    pull: float
    recording: float


@dataclass(frozen=True)
class Rates:
    """Operations per second of the model and of the pull, and where they come from."""

    source: str
    step: float
    pull: float


@dataclass(frozen=True)
class Seconds:
    """How long the operations take; `share` is the pull's time over that of the step."""

    step: float
    pull: float
    share: float
    recording: float


def operations(options: PlanOptions, sketch: Sketch, tier: str) -> Operations:
    """The operations of training and recording as `options` say."""
    attention = 2.0 * options.length * sketch.width * sketch.blocks
    forward = 2.0 * sketch.linear + attention  # per token
    own = 2.0 * sketch.elements if options.full else 6.0 * sketch.lora
    again = forward if options.gradient_checkpointing else 0
    step = (2 * forward + own + again) * options.tokens * options.accumulation
    pull = max(
        sum(pull_operations(w, tier, rank=options.rank, full=options.full) for w in weights)
        for weights in shares(sketch.weights, tier, options.processes)
    )
    return Operations(step, pull, _recording(options, sketch, forward))


def _recording(options: PlanOptions, sketch: Sketch, forward: float) -> float:
    """Operations of recording; `forward`: of a forward pass, per token."""
    estimator = ESTIMATORS[options.estimator]
    if estimator.constant:
        return 0.0
    covariances = 2.0 * sum(summed_of(options, weight) for weight in sketch.weights)
    sums = {"kronecker": covariances, "f32": 2.0 * sketch.elements}.get(estimator.tier, 0.0)
    passes = 2 if estimator.gradients else 1
    return (passes * forward + sums) * options.general_tokens


def seconds(work: Operations, rate: Rates, options: PlanOptions) -> Seconds:
    """How long the operations take at these rates."""
    step = work.step / rate.step
    pull = work.pull / rate.pull
    recording = work.recording / rate.step / options.processes
    return Seconds(step=step, pull=pull, share=pull / step, recording=recording)


def rates(options: PlanOptions, sketch: Sketch, tier: str) -> Rates:
    """Operations per second of the model and of the pull, given or measured here.

    Measured are a product like that of the model, and the pull on the commonest weight, which is
    cut to LARGEST_PULLED.
    """
    if options.flops:
        return Rates("given", step=options.flops, pull=options.flops)
    device, dtype = device_of(options), DTYPES_BY_SIZE[sketch.itemsize]
    (out, into), _ = Counter(weight.shape for weight in sketch.weights).most_common(1)[0]
    x = torch.randn(min(options.tokens, PRODUCT_ROWS), into, dtype=dtype, device=device)
    W = torch.randn(into, out, dtype=dtype, device=device)
    small = Planned("", (min(out, LARGEST_PULLED), min(into, LARGEST_PULLED)), "")
    A = torch.randn(options.rank, small.shape[1], device=device)
    B = torch.randn(small.shape[0], options.rank, device=device)
    entry = random_entry(small, tier, device)
    pull = pull_operations(small, tier, rank=options.rank, full=False)
    return Rates(
        f"measured on {device}",
        step=2 * x.shape[0] * into * out / _fastest(lambda: x @ W, device),
        pull=pull / _fastest(lambda: low_rank_pull(A, B, 1.0, entry, B, A, 1.0), device),
    )


def random_entry(weight: Planned, tier: str, device: torch.device) -> Entry:
    """Importance of one weight in this tier; a pull takes as long whatever its numbers are."""
    kind, k = parse_tier(tier)
    out, into = weight.shape
    if kind == "factored":
        rows = torch.rand(out, k or 1, device=device)
        return FactoredEntry(rows, torch.rand(into, k or 1, device=device))
    if kind == "kronecker":
        return KroneckerEntry(
            _random_covariance(out, k, device), _random_covariance(into, k, device)
        )
    entry: Entry = DenseEntry(torch.rand(out, into))
    return converted({"": entry}, kind)[""].to(device, torch.float32, {})


def _random_covariance(n: int, rank: int | None, device: torch.device) -> AnyCovariance:
    """A covariance (n, n), whole or of this rank."""
    if rank is None:
        return Covariance(torch.eye(n, device=device))
    k = min(rank, n)
    return LowRankCovariance(
        torch.randn(n, k, device=device),
        torch.rand(k, device=device),
        torch.tensor(0.1, device=device),
    )


def _fastest(call: Callable[[], Any], device: torch.device, *, budget: float = 0.3) -> float:
    """Seconds of the fastest of several calls: what others do on the machine only slows."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < budget or best == float("inf"):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best
