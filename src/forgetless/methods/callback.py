"""TODO methods.callback."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.model import engine
from forgetless.penalty.callback import write_logs


class TermCallback(TrainerCallback):
    """Adds a term's gradient once per optimizer step, before that of the data, so that clipping
    sees the sum; logs what the term says.

    A term is anything with `add(step, scale=...)` and `logs()`, as `forgetless.KL`. In several
    processes each adds the whole term; their mean is the term.
    """

    def __init__(self, term: Any, *, trainer: Any):
        self.term, self.trainer = term, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not engine.has_whole_model(self.trainer):
            kind = engine.engine_of(self.trainer)
            raise ValueError(
                f"terms such as kl and replay run the model beside the trainer, which {kind} "
                "does not allow; train in one process or with DDP"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        accelerator = self.trainer.accelerator
        scale = 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())
        with accelerator.no_sync(self.trainer.model_wrapped):
            self.term.add(state.global_step, scale=scale)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            write_logs(self.term.logs(), logs, state)


def add_term(trainer: Any, term: Any) -> TermCallback:
    """Add `term` (as `forgetless.KL`) to what `trainer` minimises; its callback comes first, so
    that TensorBoard and the console show its numbers.
    """
    callback = TermCallback(term, trainer=trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
