"""The thin bridge to the transformers Trainer and every TRL trainer: these classes delegate, they
compute nothing.

    hold(trainer, importance)          # before trainer.train()

Two facts about the host (transformers 5.23): the optimizer exists from `on_train_begin` on, inside
accelerate's wrapper; reporters are called before user callbacks and `log_history` is copied before
`on_log`, so `hold` puts its callback first and writes into both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.penalty.pull import Penalty


def check_gradients(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Raise ValueError on a non-finite gradient, before the optimizer moves anything.

    Under fp16 the GradScaler skips such steps itself.
    """
    norms = (
        []
        if args.fp16
        else torch._foreach_norm(
            [distributed.local(p.grad) for p in model.parameters() if p.grad is not None]
        )
    )
    if norms and not math.isfinite(
        float(torch.stack([norm.float().cpu() for norm in norms]).sum())
    ):
        raise ValueError(
            f"non-finite loss or gradient at step {state.global_step + 1}; the last good "
            "checkpoint is kept. "
            "Lower the learning rate or the strength, or train in float32, and resume from it"
        )


class PenaltyCallback(TrainerCallback):
    """Attaches a penalty to the trainer's optimizer, logs energy, pull norm and pull/gradient
    ratio, and stops with ValueError on a non-finite gradient.

    Added by hand (`callbacks=[PenaltyCallback(penalty)]`) it comes after the reporters: the console
    and `log_history` get its numbers, TensorBoard does not. `hold` puts it first.
    """

    def __init__(self, penalty: Penalty):
        self.penalty = penalty
        self.finishing: Callable[[], dict[str, Any]] | None = None  # set where a budget is kept
        self._attachment: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        distributed.check_engine(None, "the pull", args)
        self._attachment = self.penalty.attach(kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_gradients(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        write_logs(self.penalty.logs(), logs, state)

    def finish(self) -> dict[str, Any]:
        """After training with a budget: scales the update to what keeps it, checks it, and returns
        the report (`["verdict"]`: met, not shown, exceeded; predicted where there is no general
        text).
        """
        if self.finishing is None:
            raise ValueError(
                "finish() is for a budget: expected hold(trainer, importance, budget='1%', "
                "general='text.jsonl'), found no budget"
            )
        return self.finishing()

    def close(self) -> None:
        """Take the penalty off the optimizer."""
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None


def write_logs(mine: dict[str, float], logs: dict[str, Any], state: TrainerState) -> None:
    logs.update(mine)
    if state.log_history:
        state.log_history[-1].update(mine)


def hold_trainer(
    trainer: Any,
    importance: Importance,
    *,
    strength: float,
    layers: Any = None,
    anchor: str = "base",
    names: str | None = None,
    offload: bool = False,
) -> PenaltyCallback:
    """Build the penalty of `importance` on the trainer's model and let it pull before every step.

    The settings are those of `Penalty`. In several processes each keeps its share of the
    importance. Raises ValueError where importance does not fit the model or the engine cannot be
    held under (DeepSpeed, FSDP 1), OptionError for wrong settings.
    """
    distributed.check_engine(trainer, "the pull")
    penalty = Penalty(
        trainer.model,
        importance,
        strength=strength,
        layers=layers,
        anchor=anchor,
        names=names,
        offload=offload,
        shard=distributed.running(),
    )
    return add_penalty(trainer, penalty)


def add_penalty(trainer: Any, penalty: Penalty) -> PenaltyCallback:
    """Let `penalty` pull before every step of `trainer`; its callback comes first, so that
    TensorBoard and the console show its numbers.
    """
    callback = PenaltyCallback(penalty)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
