"""The thin bridge to the transformers Trainer and every TRL trainer: these classes delegate, they compute nothing.

    hold(trainer, importance)          # before trainer.train()

Two facts about the host (transformers 5.23): the optimizer exists from `on_train_begin` on, inside accelerate's wrapper; reporters are called before user
callbacks and `log_history` is copied before `on_log`, so `hold` puts its callback first and writes into both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import Sampler
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from holdfast import distributed
from holdfast.config import default_strength
from holdfast.importance.attachment import PathRecorder
from holdfast.importance.container import Importance
from holdfast.options import OptionError
from holdfast.penalty.pull import Penalty


def check_gradients(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    """Raise ValueError on a non-finite gradient, before the optimizer moves anything. Under fp16 the GradScaler skips such steps itself."""
    norms = [] if args.fp16 else torch._foreach_norm([distributed.local(p.grad) for p in model.parameters() if p.grad is not None])
    if norms and not math.isfinite(float(torch.stack([norm.float().cpu() for norm in norms]).sum())):
        raise ValueError(f"non-finite loss or gradient at step {state.global_step + 1}; the last good checkpoint is kept. "
                         "Lower the learning rate or the strength, or train in float32, and resume from it")  # fmt: skip


class StopOnNonFinite(TrainerCallback):
    """Stops before a step on a non-finite gradient, and before a checkpoint of non-finite weights, so that the last checkpoint stays good."""

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_gradients(args, state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save and not all(bool(torch.isfinite(distributed.local(p)).all()) for p in kwargs["model"].parameters() if p.requires_grad):
            raise ValueError(f"non-finite weights after step {state.global_step}; the last good checkpoint is kept. "
                             "Lower the learning rate, or train in float32, and resume from it")  # fmt: skip


class HoldfastCallback(TrainerCallback):
    """Attaches a penalty to the trainer's optimizer, logs energy, pull norm and pull/gradient ratio, and stops with ValueError on a non-finite gradient.

    Added by hand (`callbacks=[HoldfastCallback(penalty)]`) it comes after the reporters: the console and `log_history` get its numbers, TensorBoard
    does not. `hold` puts it first.
    """

    def __init__(self, penalty: Penalty):
        self.penalty = penalty
        self.finishing: Callable[[], dict[str, Any]] | None = None  # set where a budget is kept
        self._attachment: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()
        distributed.check_engine(None, "the pull", args)
        self._attachment = self.penalty.attach(kwargs["optimizer"])

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_gradients(args, state, kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        _log(self.penalty.logs(), logs, state)

    def finish(self) -> dict[str, Any]:
        """After training with a budget: scales the update to what keeps it, checks it, and returns the report (`["verdict"]`: met, not shown, exceeded;
        predicted where there is no general text)."""
        if self.finishing is None:
            raise ValueError("finish() is for a budget: expected hold(trainer, importance, budget='1%', general='text.jsonl'), found no budget")
        return self.finishing()

    def close(self) -> None:
        """Take the penalty off the optimizer."""
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None


class HoldCallback(HoldfastCallback):
    """`hold` as a callback, for hosts that take callbacks before there is a trainer (LLaMA-Factory, or a list in a configuration): the penalty is made of
    the trainer's model when training begins. The arguments are those of `hold`, without a budget, which needs the trainer.

    Raises, when training begins, ValueError where importance does not fit the model, OptionError for wrong settings.
    """

    penalty: Penalty

    def __init__(self, importance: Importance | str | Path, *, strength: float | None = None, layers: Any = None, anchor: str = "base",
                 names: str | None = None, offload: bool = False):  # fmt: skip
        self.importance = importance if isinstance(importance, Importance) else Importance.from_pretrained(importance)
        self.strength = default_strength(self.importance.info.get("estimator", "?")) if strength is None else strength
        self.settings: dict[str, Any] = dict(layers=layers, anchor=anchor, names=names, offload=offload)
        self.finishing = self._attachment = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.penalty = Penalty(kwargs["model"], self.importance, strength=self.strength, **self.settings)
        super().on_train_begin(args, state, control, **kwargs)


class TermCallback(TrainerCallback):
    """Adds a term's gradient once per optimizer step, before that of the data, so that clipping sees the sum; logs what the term says.

    A term is anything with `add(step, scale=...)` and `logs()`, as `holdfast.KL`. In several processes each adds the whole term; their mean is the term.
    """

    def __init__(self, term: Any, *, trainer: Any):
        self.term, self.trainer = term, trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not distributed.has_whole_model(self.trainer):
            kind = distributed.engine(self.trainer)
            raise ValueError(f"terms such as kl and replay run the model beside the trainer, which {kind} does not allow; train in one process or with DDP")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        scale = 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())
        with accelerator.no_sync(self.trainer.model_wrapped):
            self.term.add(state.global_step, scale=scale)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            _log(self.term.logs(), logs, state)


def _log(mine: dict[str, float], logs: dict[str, Any], state: TrainerState) -> None:
    logs.update(mine)
    if state.log_history:
        state.log_history[-1].update(mine)


SHOWN = (("loss", "loss"), ("kl", "kl"), ("energy", "energy"), ("pull", "pull_norm"))  # name in the bar, name in the log


class ProgressBar(ProgressCallback):
    """The trainer's bar with loss, energy, pull and tokens/s of the last log beside its ETA."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shown = {name: f"{logs[key]:.3g}" for name, key in SHOWN if logs and key in logs}
        now, tokens = time.perf_counter(), float((logs or {}).get("num_tokens", 0))
        then, seen = getattr(self, "_last", (now, tokens))
        if tokens > seen and now > then:
            shown["tokens/s"] = f"{(tokens - seen) / (now - then):,.0f}"
        self._last = (now, tokens)
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown, refresh=False)
        super().on_log(args, state, control, logs=logs, **kwargs)


class RecorderCallback(TrainerCallback):
    """Records importance under a Trainer: attaches the recorder, ends its epochs with the trainer's, hands it the GradScaler.

    Raises OptionError when the trainer clips gradients (max_grad_norm > 0) and the recorder reads the factors' gradients (gradient="effective"): by the time
    of the step they have been clipped. gradient="exact" is taken in the backward pass and is not affected.
    """

    def __init__(self, recorder: PathRecorder, *, trainer: Any = None):
        self.recorder, self.trainer = recorder, trainer
        self._attachment: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        distributed.check_engine(self.trainer, "recording", args)
        reads_parameters = self.recorder.gradient == "effective" or any(not hasattr(w, "A") for w in self.recorder.weights)
        if args.max_grad_norm and reads_parameters:
            raise OptionError(f"max_grad_norm is {args.max_grad_norm}: the recorder would see clipped gradients; set max_grad_norm=0 while recording")
        if args.fp16 and self.trainer is None:
            raise OptionError("fp16 scales the loss: pass RecorderCallback(recorder, trainer=trainer) so that the scale is known")
        scaler = getattr(getattr(self.trainer, "accelerator", None), "scaler", None)
        self._attachment = self.recorder.attach(kwargs["optimizer"], scaler=scaler)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder.end_epoch()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None


def hold(trainer: Any, importance: Importance | str | Path, *, strength: float | None = None, layers: Any = None, anchor: str = "base",
         names: str | None = None, offload: bool = False, budget: str | None = None, general: str | None = None) -> HoldfastCallback:  # fmt: skip
    """Hold `trainer.model` while it trains: builds the penalty, and puts its callback first so that TensorBoard and the console show its numbers.

    `strength` None takes what suits the importance's estimator (`config.STRENGTHS`); the rest is as in `Penalty`. Returns the callback; its `.penalty` tells
    the energy. With `budget` ("1%" of perplexity on the text `general`, or "0.01nats") the strength is controlled from there on, and `finish()` of the
    callback scales, checks and reports after `trainer.train()` (docs/budget.md); without `general` the rise is predicted by the importance's calibration, and
    the verdict is `predicted`. In several processes each keeps its share of the importance (docs/scaling.md); every process calls `hold`.
    Raises ValueError when importance does not fit the model, the text cannot show the budget or the engine cannot be held under (DeepSpeed, FSDP 1),
    OptionError for wrong settings.
    """
    if general is not None and budget is None:
        raise OptionError(f"general text is for a budget (budget='1%'), found general={general!r} and no budget")
    distributed.check_engine(trainer, "the pull")
    if budget is not None and not distributed.has_whole_model(trainer):
        raise ValueError("a budget measures general text beside the trainer, which FSDP does not allow; train in one process or with DDP, or give a strength")
    loaded = importance if isinstance(importance, Importance) else Importance.from_pretrained(importance)
    if budget is not None:
        from holdfast.keeper import of_trainer

        keeper = of_trainer(trainer, budget, general, loaded, names)
        return keeper.bind(trainer, loaded, start=strength, layers=layers, anchor=anchor, names=names, offload=offload)
    strength = default_strength(loaded.info.get("estimator", "?")) if strength is None else strength
    penalty = Penalty(trainer.model, loaded, strength=strength, layers=layers, anchor=anchor, names=names, offload=offload, shard=distributed.running())
    return add_penalty(trainer, penalty)


def add_penalty(trainer: Any, penalty: Penalty) -> HoldfastCallback:
    """Let `penalty` pull before every step of `trainer`; its callback comes first, so that TensorBoard and the console show its numbers."""
    callback = HoldfastCallback(penalty)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def add_term(trainer: Any, term: Any) -> TermCallback:
    """Add `term` (as `holdfast.KL`) to what `trainer` minimises; its callback comes first, so that TensorBoard and the console show its numbers."""
    callback = TermCallback(term, trainer=trainer)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class FullSteps(Sampler[int]):
    """A trainer's random order of `count` rows, then `blank`, the index of a row that scores nothing, until the last optimizer step is full too."""

    def __init__(self, count: int, per_step: int, seed: int):
        self.inner = SeedableRandomSampler(range(count), data_seed=seed)
        self.count, self.blanks = count, -count % per_step

    def __len__(self) -> int:
        return self.count + self.blanks

    def __iter__(self) -> Iterator[int]:
        yield from self.inner
        yield from [self.count] * self.blanks

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch."""
        self.inner.set_epoch(epoch)


def whole_steps(trainer: Any) -> None:
    """Let several processes train on the rows that one would, in the same steps; nothing to do in one.

    accelerate fills an epoch's last batches with rows from its beginning, which then count twice. A row without labels fills them here; that row
    comes after all others.
    """
    if not distributed.running():
        return
    data, args = trainer.train_dataset, trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * distributed.size()
    blank = {**data[0], "labels": [-100] * len(data[0]["labels"])}
    seed = args.seed if args.data_seed is None else args.data_seed
    trainer.train_dataset = data.add_item(blank)
    trainer._get_train_sampler = lambda _=None: FullSteps(len(data), per_step, seed)
