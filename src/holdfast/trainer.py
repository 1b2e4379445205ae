"""The trainer of tune(): TRL's SFTTrainer with our settings, and its training begun or gone on with. Nothing in it knows of the penalty.

    trainer = made(options, peft_model, tokenizer, encoded, held)
    train(trainer, last_checkpoint(out) if options.resume else None)

Rows come encoded and cut; a step of several processes is the same sequences as in one.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, TrainerState

from holdfast import distributed
from holdfast.callback import ProgressBar, StopOnNonFinite, whole_steps
from holdfast.config import TuneOptions
from holdfast.models import context_length
from holdfast.run_folder import clear_checkpoints
from holdfast.weights import unwrapped


def made(options: TuneOptions, model: nn.Module, tokenizer: Any, data: Any, held: Any, optimizer: Any = None) -> Any:
    """A trainer on encoded rows, measured on `held` where given. Without `optimizer` it makes its AdamW."""
    from trl import SFTConfig, SFTTrainer

    base = unwrapped(model)
    batch_size, accumulation = distributed.split_batch(options.batch_size, options.accumulation)
    bf16 = next(base.parameters()).dtype == torch.bfloat16 and torch.cuda.is_available()
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
        max_length=min(options.length, context_length(base)) if options.packing else None,  # rows come cut already
        packing=options.packing,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=bf16,
        seed=options.seed,
        data_seed=options.seed,
        eval_strategy="steps" if held is not None else "no",
        eval_steps=options.eval_steps or None,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=options.log_steps,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    config._n_gpu = min(config.n_gpu, 1)  # else the trainer spreads a lone process's batches over all GPUs (DataParallel), and a step is larger than asked for
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, eval_dataset=held, processing_class=tokenizer, callbacks=[StopOnNonFinite()],
                         optimizers=(optimizer, None))  # fmt: skip
    whole_steps(trainer)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    return trainer


def train(trainer: Any, checkpoint: str | None) -> None:
    """Train, from `checkpoint` where there is one. A finished one is only loaded: transformers 5.23 would take one more step from there."""
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= (trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps):
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its log: progress, not a result
            trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        clear_checkpoints(Path(trainer.args.output_dir))
        raise
