"""Terms of the loss in somebody's trainer, such as replayed text or the divergence from the base.

    term = forgetless.KL(trainer.model, encode_documents(documents, tokenizer), weight=1.0)
    forgetless.add_term(trainer, term)      # before trainer.train()

The callback only delegates: what a term computes stands in methods/terms.py.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from forgetless.model import engine
from forgetless.penalty.callback import LoggingCallback


class TermCallback(LoggingCallback):
    """Adds a term's gradient once per optimizer step, before that of the data, and logs what the
    term says.

    Clipping then sees the sum. A term is anything with `add(step, scale=...)` and `logs()`, such as
    `forgetless.KL`. In several processes each adds the full term, and the mean of their gradients
    is that of the term.
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

    def logged(self) -> dict[str, float]:
        numbers: dict[str, float] = self.term.logs()
        return numbers


def add_term(trainer: Any, term: Any) -> TermCallback:
    """Add `term` (such as `forgetless.KL`) to what `trainer` minimises.

    Its callback comes first, so that TensorBoard and the console show its numbers.
    """
    callback = TermCallback(term, trainer=trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
