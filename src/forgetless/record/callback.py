"""A path recorder under a transformers Trainer, or one that is built on it.

For example:

    trainer.add_callback(RecorderCallback(recorder, trainer=trainer))
    trainer.train()
    importance = recorder.finish()
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.errors import OptionError
from forgetless.model import engine
from forgetless.record.path_recorder import PathRecorder


class RecorderCallback(TrainerCallback):
    """Records importance under a Trainer.

    It attaches the recorder, ends its epochs with the trainer's, and hands it the GradScaler.

    Raises OptionError when the trainer clips gradients (max_grad_norm > 0) and the recorder reads
    the factors' gradients (gradient="effective"): by the time of the step they have been clipped.
    gradient="exact" is taken in the backward pass and is not affected.
    """

    def __init__(self, recorder: PathRecorder, *, trainer: Any = None):
        self.recorder, self.trainer = recorder, trainer
        self._attachment: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine.check_engine(self.trainer, "recording", args)
        reads_parameters = self.recorder.gradient == "effective" or any(
            not hasattr(w, "A") for w in self.recorder.weights
        )
        if args.max_grad_norm and reads_parameters:
            raise OptionError(
                f"max_grad_norm is {args.max_grad_norm}: the recorder would see clipped "
                "gradients; set max_grad_norm=0 while recording"
            )
        if args.fp16 and self.trainer is None:
            raise OptionError(
                "fp16 scales the loss: pass RecorderCallback(recorder, trainer=trainer) so that "
                "the scale is known"
            )
        scaler = getattr(getattr(self.trainer, "accelerator", None), "scaler", None)
        self._attachment = self.recorder.attach(kwargs["optimizer"], scaler=scaler)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recorder.end_epoch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None
