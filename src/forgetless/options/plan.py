"""Options of `forgetless plan`."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.options.estimators import ESTIMATORS
from forgetless.options.model import ModelOptions
from forgetless.options.option import RUNNING, option, same
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions


@dataclass(frozen=True)
class PlanOptions(ModelOptions):
    """Options of `forgetless plan`: bytes and time, from the model's configuration alone."""

    targets: str = option(
        "all-linear",
        "weights to adapt: names (q_proj,v_proj), all-linear, or a regular expression",
        group="adapter",
        metavar="NAMES",
    )
    rank: int = option(8, "LoRA rank r", group="adapter", at_least=1)
    full: bool = same(TuneOptions, "full")
    estimator: str = option(
        "kronecker", "how importance is estimated", group="importance", choices=ESTIMATORS
    )
    tier: str | None = option(
        None,
        "form of the file that tuning reads: f32, bf16, u8, u4, factored[:K], kronecker[:K]; "
        "default: as record writes it",
        group="importance",
        metavar="TIER",
    )
    cov_rank: int = option(
        64,
        "kronecker: rank of the covariances that record keeps; 0: whole",
        group="importance",
        at_least=0,
    )
    tokens: int = option(4096, "tokens per forward pass while tuning", group="data", at_least=2)
    length: int = option(1024, "tokens per sequence", group="data", at_least=2)
    accumulation: int = option(4, "forward passes per optimizer step", group="training", at_least=1)
    general_tokens: int = option(
        500_000, "tokens of general text to record from", group="data", at_least=1
    )
    record_tokens: int = option(
        4096, "tokens per forward pass while recording", group="data", at_least=2
    )
    gradient_checkpointing: bool = same(RecordOptions, "gradient_checkpointing")
    processes: int = option(
        1, "processes that train together, one per device", group="training", at_least=1
    )
    engine: str = option(
        "ddp",
        "ddp: each has the whole model; fsdp: weights, gradients and optimizer state are sharded",
        group="training",
        choices=("ddp", "fsdp"),
    )
    flops: float | None = option(
        None,
        "floating-point operations per second of a device, as 400e12; default: measured here",
        group="training",
        above=0,
        metavar="RATE",
    )
    json: bool = option(False, "print JSON", group="output", decides=RUNNING)
