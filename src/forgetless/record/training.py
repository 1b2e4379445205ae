"""Recording by training: a short training of a fresh adapter, which a path recorder watches.

AdamW on general text, unclipped, without weight decay. A state is saved every `save_steps` steps,
and going on from it gives what an uninterrupted training gives, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from forgetless.data.encoding import Encoded, batches
from forgetless.files.room import check_free_space
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.adapters import adapter_of
from forgetless.model.targets import target_weights
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.options.reference import resolved
from forgetless.record import state as recording_state
from forgetless.record.path_recorder import PathRecorder
from forgetless.record.state import TrainedState
from forgetless.record.steps import EPOCH_SEEDS, Batch, step
from forgetless.record.text import RecordingText
from forgetless.report.terminal import progress

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class StepCount:
    """How many optimizer steps a training takes."""

    in_epoch: int
    total: int

    @staticmethod
    def of(options: RecordOptions, pieces: int) -> StepCount:
        """Those on so many pieces of text."""
        in_epoch = math.ceil(pieces / (options.batch_size * options.accumulation))
        total = in_epoch * options.epochs
        if options.max_steps is not None:
            total = min(options.max_steps, total)
        return StepCount(in_epoch, total)


def by_training(
    options: RecordOptions,
    model: nn.Module,
    text: RecordingText,
    pad_id: int,
    state: TrainedState | None,
) -> tuple[Importance, float]:
    """Importance by an estimator that trains an adapter, going on from `state` where there is one.

    Returns it with the seconds that it took, those before an interruption included. The adapter
    stays in `model`.
    """
    assert text.source is not None
    steps = StepCount.of(options, len(text.pieces))
    adapted = _adapted(options, model)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    check_free_space(options.out, _bytes_of_training(options, adapted, trainable, steps.total))
    logger.info(
        "recording %s on %s: %d documents, %s tokens, %d steps; %s trainable parameters; path "
        "integral, %s gradient; seed %d",
        options.model,
        options.general,
        text.source.documents,
        f"{text.source.tokens:,}",
        steps.total,
        f"{trainable:,}",
        options.gradient,
        options.seed,
    )
    if distributed.rank():  # dropout draws masks of its own in each process
        torch.manual_seed(options.seed + distributed.rank())
    started = time.perf_counter()
    recorder: PathRecorder = resolved(str(ESTIMATORS[options.estimator].recorder))(
        adapted,
        gradient=options.gradient,
        xi=options.xi,
        clamp=options.clamp,
        offload=options.offload,
    )
    training = Training(adapted, recorder, options, steps, text.source.sha256)
    if state is not None:
        training.restore(state)
    spent = training.seconds
    train(training, text.pieces, pad_id)
    return recorder.finish(), spent + time.perf_counter() - started


class Training:
    """An adapter in training, with the recorder, the optimizer and how far it has come: what a
    saved state holds together.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: PathRecorder,
        options: RecordOptions,
        steps: StepCount,
        data: str,
    ):
        self.model, self.recorder, self.options = model, recorder, options
        self.steps = steps
        self.data = data  # sha256 of the text
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
        decay = _rate_factor(options, steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        self.done = 0  # optimizer steps
        self.seconds = 0.0  # spent on them before an interruption

    def save(self, seconds: float) -> None:
        """Save the state, with the seconds spent so far."""
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        state = TrainedState(
            data=self.data,
            adapter=trained,
            recorder=self.recorder.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            done=self.done,
            seconds=seconds,
            rng=torch.get_rng_state(),
        )
        recording_state.write(self.options, state)

    def restore(self, state: TrainedState) -> None:
        """Be where `state` was saved."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state.adapter[name])
        self.recorder.load_state_dict(state.recorder)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        torch.set_rng_state(state.rng)
        self.done, self.seconds = int(state.done), float(state.seconds)


def train(training: Training, pieces: list[Encoded], pad_id: int) -> None:
    """Train until all steps are done, under the recorder.

    Raises ValueError where the loss is no number.
    """
    options, steps, recorder = training.options, training.steps, training.recorder
    training.model.train()
    started = time.perf_counter()
    with (
        recorder.attach(training.optimizer),
        progress("recording", steps.total, done=training.done, shown=distributed.first()) as bar,
    ):
        while training.done < steps.total:
            epoch, first = divmod(training.done, steps.in_epoch)
            groups = _groups(pieces, options, pad_id, epoch)
            for group in groups[first : first + steps.total - training.done]:
                began = time.perf_counter()
                loss, tokens = step(training.model, training.optimizer, group)
                _check_loss(loss, training.done + 1)
                training.scheduler.step()
                training.done += 1
                rate = tokens / (time.perf_counter() - began)
                bar.advance(said=f"loss {loss:.3f}, {rate:,.0f} tokens/s")
                if training.done % steps.in_epoch == 0:
                    recorder.end_epoch()
                if training.done % options.save_steps == 0 and training.done < steps.total:
                    training.save(training.seconds + time.perf_counter() - started)


def _rate_factor(options: RecordOptions, steps: StepCount) -> Callable[[int], float]:
    """By what the learning rate is multiplied after so many steps."""
    if options.schedule == "linear":
        return lambda done: 1.0 - done / steps.total
    return lambda done: 1.0


def _groups(
    pieces: list[Encoded], options: RecordOptions, pad_id: int, epoch: int
) -> list[list[Batch]]:
    """The micro-batches of each optimizer step of one epoch, in the order that the seed and the
    epoch give.
    """
    seed = options.seed * EPOCH_SEEDS + epoch
    micro = list(batches(pieces, batch_size=options.batch_size, pad_id=pad_id, shuffle_seed=seed))
    return [micro[i : i + options.accumulation] for i in range(0, len(micro), options.accumulation)]


def _check_loss(loss: float, number: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {number}; lower --learning-rate or use "
            "--dtype float32; the last saved state is kept for --resume"
        )


def _adapted(options: RecordOptions, model: nn.Module) -> nn.Module:
    """`model` with the fresh adapter that is trained."""
    adapted: Any = adapter_of(model, options)
    if options.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        adapted.enable_input_require_grads()
    return adapted


def _bytes_of_training(options: RecordOptions, model: nn.Module, trainable: int, total: int) -> int:
    """Bytes of the file with its anchor (f32), and of two states while one replaces the other:
    credit, Omega, adapter and AdamW's moments, all f32.
    """
    elements = sum(math.prod(weight.shape) for weight in target_weights(model))
    file = elements * (2 if options.tier == "bf16" else 4) + 4 * trainable
    return file + (2 * (8 * elements + 12 * trainable) if total > options.save_steps else 0)
