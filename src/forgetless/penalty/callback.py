"""The bridge from a penalty to the transformers Trainer, and so to every TRL trainer.

The callback delegates and computes nothing.

    add_penalty(trainer, penalty)          # before trainer.train()

Two facts about the host (transformers 5.23) shape it. The optimizer exists from `on_train_begin`
on, inside accelerate's wrapper. Reporters are called before user callbacks, and `log_history` is
copied before `on_log`; so `add_penalty` puts its callback first, and numbers are written into both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.files.budget_json import BudgetReport
from forgetless.files.schema import to_json
from forgetless.files.untrusted import JsonObject
from forgetless.model import engine, shards
from forgetless.penalty.attachment import PenaltyAttachment
from forgetless.penalty.pull import Penalty


def check_gradients(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Raise ValueError on a non-finite gradient, before the optimizer moves anything.

    Under fp16 the GradScaler skips such steps itself.
    """
    if args.fp16:
        return
    gradients = [shards.local(p.grad) for p in model.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if norms and not math.isfinite(
        float(torch.stack([norm.float().cpu() for norm in norms]).sum())
    ):
        raise ValueError(
            f"non-finite loss or gradient at step {state.global_step + 1}; the last good "
            "checkpoint is kept. Lower the learning rate or the strength, or train in float32, "
            "and resume from it"
        )


def write_logs(numbers: dict[str, float], logs: dict[str, Any], state: TrainerState) -> None:
    """Write numbers of ours into what reporters get, and into the trainer's history; where the
    trainer has a number of that name ("kl" of GRPO), ours is "forgetless/kl".
    """
    numbers = {f"forgetless/{name}" if name in logs else name: numbers[name] for name in numbers}
    logs.update(numbers)
    if state.log_history:
        state.log_history[-1].update(numbers)


class LoggingCallback(TrainerCallback):
    """A callback with numbers of its own beside each loss that the trainer logs."""

    def logged(self) -> dict[str, float]:
        """What there is to log now, by name."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            write_logs(self.logged(), logs, state)


class PenaltyCallback(LoggingCallback):
    """Attaches a penalty to the trainer's optimizer, and logs what it does.

    The log gets energy, norm of the pull and its ratio to the gradient's. Training stops with
    ValueError on a non-finite gradient. Added by hand (`callbacks=[PenaltyCallback(penalty)]`) the
    callback comes after the reporters: the console and `log_history` get its numbers, TensorBoard
    does not. `hold` and `add_penalty` put it first.
    """

    # Whether the trainer's next `hold` takes its place (integrations/hold.py).
    made_by_hold = False

    def __init__(self, penalty: Penalty):
        self.penalty = penalty
        self.finishing: Callable[[], BudgetReport] | None = None  # set where a budget is kept
        self._attachment: PenaltyAttachment[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        engine.check_engine(None, "the pull", args)
        self._attachment = self.penalty.attach(kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_gradients(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def logged(self) -> dict[str, float]:
        return self.penalty.logs()

    def finish(self) -> JsonObject:
        """After training with a budget: scale the update to what keeps it, and check it.

        Returns the report as run.json has it, whose `["verdict"]` is met, not shown or exceeded, or
        predicted where there is no general text. Raises ValueError where no budget is kept.
        """
        if self.finishing is None:
            raise ValueError(
                "finish() is for a budget: expected hold(trainer, importance, budget='1%', "
                "general='text.jsonl'), found no budget"
            )
        report: JsonObject = to_json(self.finishing())
        return report

    def close(self) -> None:
        """Take the penalty off the optimizer."""
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None


def add_penalty(trainer: Any, penalty: Penalty) -> PenaltyCallback:
    """Let `penalty` pull before every step of `trainer`; returns its callback.

    The callback comes first, so that TensorBoard and the console show its numbers.
    """
    callback = PenaltyCallback(penalty)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
