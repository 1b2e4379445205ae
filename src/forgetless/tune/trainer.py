"""The trainer of tune(): TRL's SFTTrainer with our settings, trained from the start or from a
checkpoint.

Nothing in it knows of the penalty, which is attached from outside (tune/adapted.py).

    trainer = make_trainer(options, peft_model, tokenizer, rows)
    train_from(trainer, last_checkpoint(out) if options.resume else None)

Rows come encoded and cut. A step of several processes is the same sequences as in one.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from forgetless.errors import FileError
from forgetless.files.run_json import LogEntry
from forgetless.files.schema import read_record
from forgetless.files.untrusted import JsonObject
from forgetless.model import distributed, shards
from forgetless.model.linear import unwrapped
from forgetless.model.loading import context_length
from forgetless.options.tune import TuneOptions
from forgetless.penalty.callback import check_gradients
from forgetless.tune.log_lines import LogLines
from forgetless.tune.rows import Rows
from forgetless.tune.run_folder import clear_checkpoints


class StopOnNonFinite(TrainerCallback):
    """Stops before a step on a non-finite gradient, and before a checkpoint of non-finite weights,
    so that the last checkpoint stays good.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_gradients(args, state, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and not _all_finite(kwargs["model"]):
            raise ValueError(
                f"non-finite weights after step {state.global_step}; the last good checkpoint is "
                "kept. Lower the learning rate, or train in float32, and resume from it"
            )


def _all_finite(model: nn.Module) -> bool:
    """Whether every trained weight of this process is finite."""
    return all(
        bool(torch.isfinite(shards.local(p)).all()) for p in model.parameters() if p.requires_grad
    )


class FullSteps(Sampler[int]):
    """A trainer's random order of `count` rows, then `blank`, the index of a row that scores
    nothing, until the last optimizer step is full too.
    """

    def __init__(self, count: int, per_step: int, seed: int):
        self.inner = SeedableRandomSampler(range(count), data_seed=seed)
        self.count = count
        self.blanks = -count % per_step

    def __len__(self) -> int:
        return self.count + self.blanks

    def __iter__(self) -> Iterator[int]:
        yield from self.inner
        yield from [self.count] * self.blanks

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch."""
        self.inner.set_epoch(epoch)


def whole_steps(trainer: Any) -> None:
    """Let several processes train on the rows that one would, in the same steps; nothing to do in
    one.

    accelerate fills an epoch's last batches with rows from its beginning, which then count twice. A
    row without labels fills them here; that row comes after all others.
    """
    if not distributed.running():
        return
    data, args = trainer.train_dataset, trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * distributed.world_size()
    blank = {**data[0], "labels": [-100] * len(data[0]["labels"])}
    seed = args.seed if args.data_seed is None else args.data_seed
    trainer.train_dataset = data.add_item(blank)
    trainer._get_train_sampler = lambda _=None: FullSteps(len(data), per_step, seed)


def make_trainer(
    options: TuneOptions,
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """A trainer on encoded rows; without `optimizer` it makes its AdamW."""
    from trl import SFTTrainer

    config = _config(options, unwrapped(model), evaluates=rows.evaluated is not None)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows.training,
        eval_dataset=rows.evaluated,
        processing_class=tokenizer,
        callbacks=[StopOnNonFinite()],
        optimizers=(optimizer, None),
    )
    whole_steps(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogLines(shown=distributed.first()))
    return trainer


def _config(options: TuneOptions, base: nn.Module, *, evaluates: bool) -> Any:
    """The trainer's settings, as an SFTConfig."""
    from trl import SFTConfig

    batch_size, accumulation = distributed.split_batch(options.batch_size, options.accumulation)
    dtype = next(base.parameters()).dtype
    config = SFTConfig(
        output_dir=str(Path(options.out) / "checkpoints"),
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulation,
        # Without packing the rows come cut already.
        max_length=min(options.length, context_length(base)) if options.packing else None,
        packing=options.packing,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=dtype == torch.bfloat16 and torch.cuda.is_available(),
        fp16=dtype == torch.float16 and torch.cuda.is_available(),  # with loss scaling
        seed=options.seed,
        data_seed=options.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_steps or None,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        disable_tqdm=True,  # log_lines.py has a bar
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    # With more than one, the trainer spreads a lone process's batches over all GPUs (DataParallel),
    # and a step is larger than asked for.
    config._n_gpu = min(config.n_gpu, 1)
    return config


@dataclass(frozen=True)
class _StoredState:
    """What a checkpoint must say for training to go on from it."""

    global_step: int
    max_steps: int
    log_history: list[LogEntry] = field(default_factory=list)
    stateful_callbacks: JsonObject = field(default_factory=dict)


def _checkpoint_state(checkpoint: Path) -> TrainerState:
    """The state of the trainer in a checkpoint. Raises FileError where it is none."""
    path = checkpoint / "trainer_state.json"
    try:
        read_record(path, _StoredState)
        return TrainerState.load_from_json(str(path))
    except (TypeError, ValueError) as error:
        raise FileError(
            f"{error}; remove {checkpoint} to go on from the checkpoint before it, or start again "
            "with --overwrite"
        ) from None


def train_from(trainer: Any, checkpoint: str | None) -> float:
    """Train, from `checkpoint` where there is one; returns the seconds that it took.

    A finished checkpoint is only loaded: transformers 5.23 would take one more step from there.
    """
    started = time.perf_counter()
    if checkpoint is not None:
        state = _checkpoint_state(Path(checkpoint))
        last = trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps
        if state.global_step >= last:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return time.perf_counter() - started
    try:
        # What hosts print is progress and not a result.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        clear_checkpoints(Path(trainer.args.output_dir))
        raise
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LogLines):
                callback.close()
    return time.perf_counter() - started
