"""The engines that train a model in several processes, and those that forgetless cannot use.

In one process and with DDP every process has the whole model; FSDP2 shards it by rows. DeepSpeed
and FSDP 1 are refused, with what to use instead.
"""

from __future__ import annotations

import os
from typing import Any

from forgetless.errors import OptionError

# accelerate's words for runs in which every process has the whole model.
DATA_PARALLEL = (
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_XPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_HPU",
    "MULTI_MUSA",
    "MULTI_SDAA",
    "MULTI_NEURON",
)
# Engines that the verbs do not run on, and the variable by which `accelerate launch` says each.
LAUNCHED_ENGINES = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


def engine_of(trainer: Any) -> str:
    """accelerate's word for how `trainer` runs; NO without one."""
    accelerator = getattr(trainer, "accelerator", None)
    return str(getattr(getattr(accelerator, "distributed_type", None), "value", "NO"))


def has_whole_model(trainer: Any) -> bool:
    """Whether every process has the whole model: in one process, and with DDP."""
    return engine_of(trainer) in DATA_PARALLEL


def check_engine(trainer: Any, what: str, args: Any = None) -> None:
    """Raise ValueError for engines under which a Trainer cannot do `what`.

    The error names what can be used instead. Without `trainer`, its `args` tell what they can.
    """
    kind = engine_of(trainer)
    accelerator = getattr(trainer, "accelerator", None)
    if args is None:
        args = getattr(trainer, "args", None)
    if kind == "DEEPSPEED" or getattr(args, "deepspeed", None):
        raise ValueError(
            f"{what} does not run on DeepSpeed: ZeRO keeps gradients and steps its optimizer by "
            "itself, so what is added before the step would not reach the weights; use DDP or "
            "FSDP2 (examples/accelerate/ddp.yaml, fsdp2.yaml)"
        )
    if kind == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise ValueError(
            f"{what} does not run on FSDP 1, whose flat parameters hide the weights; set "
            "fsdp_version: 2 (examples/accelerate/fsdp2.yaml), or use DDP"
        )
    if kind not in (*DATA_PARALLEL, "FSDP"):
        raise ValueError(
            f"{what} is not made for {kind}; use DDP or FSDP2 (examples/accelerate/ddp.yaml, "
            "fsdp2.yaml)"
        )


def check_launch() -> None:
    """Raise OptionError where `accelerate launch` was told an engine that no verb runs on."""
    for name, variable in LAUNCHED_ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            also = ""
            if name == "FSDP":
                also = (
                    ", or with FSDP2 in a script of your own: forgetless.hold(trainer, importance)"
                )
            raise OptionError(
                "forgetless's verbs measure and save the model outside of training, which "
                f"{name} does not allow; use DDP (examples/accelerate/ddp.yaml){also}"
            )
