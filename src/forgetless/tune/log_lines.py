"""What people see while a model is trained: a line for every entry of the trainer's log, and a bar.

       step    loss     rate  energy  strength  tokens/s     left
    10/240    2.214  9.6e-04 1.2e-05        10     1,984   2 min 3 s
    20/240    2.101  9.2e-04 4.0e-05        12     2,011  1 min 50 s

A line fits 80 columns and has the columns that the run logs. It goes to standard error, the bar too
where that is a terminal. The trainer's own entries stay as they are in its history, in files and in
trackers; only its printing of them is replaced.

A loss that explodes is said, and noted in the log as `loss_exploded`, by which the command line
ends with an error.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.files.run_json import EXPLODED
from forgetless.model.linear import unwrapped
from forgetless.penalty.callback import write_logs
from forgetless.report import numbers
from forgetless.report.terminal import Bar, progress, say

logger = logging.getLogger("forgetless")
# The loss has exploded where it ends so many nats and so many times above where it began. Chosen,
# not measured: far enough from the noise between the steps of a log, where both must hold.
RISEN_BY = 1.0
RISEN_TIMES = 1.3
# Columns that may stand in a line: heading, key in the log, width, format.
COLUMNS = (
    ("loss", "loss", 7, ".4g"),
    ("rate", "learning_rate", 7, ".1e"),
)
# What says how far the model has moved: the first that the run logs has the column.
HELD_COLUMNS = (
    ("KL", "kl", 7, ".2g"),
    ("energy", "energy", 7, ".1e"),
)
# Of a run with a budget: the rise of the loss on general text, or the divergence, in nats.
RISE = ("rise", "budget/rise", 8, ".2g")
STRENGTH = ("strength", "budget/strength", 8, ".3g")
# Where it sets no pull but the divergence alone.
WEIGHT = ("weight", "budget/kl_weight", 8, ".3g")


class LogLines(TrainerCallback):
    """Shows the training in one process, `shown` being false in the others."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self._open = contextlib.ExitStack()
        self._bar: Bar | None = None
        self._columns: list[str] = []
        self._counted = (0.0, 0.0)  # when tokens were last counted, and how many there were
        self._first_evaluated: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        self._began = (time.perf_counter(), state.global_step)
        self._counted = (time.perf_counter(), float(getattr(state, "num_input_tokens_seen", 0)))
        self._bar = self._open.enter_context(
            progress(
                "tuning", state.max_steps, done=state.global_step, shown=self.shown, told=False
            )
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not self.shown:
            return
        if "eval_loss" in logs:
            self._say_evaluated(state.global_step, float(logs["eval_loss"]))
        elif "loss" in logs:
            self._say_step(state, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        began, first = self._began
        if self.shown:
            took = numbers.duration(time.perf_counter() - began)
            say(f"tuning: {state.global_step - first:,} steps in {took}")
        self._look_for_explosion(state, kwargs["model"], args.learning_rate)

    def close(self) -> None:
        """Take the bar away, however the training ended."""
        self._open.close()
        self._bar = None

    def _say_step(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        cells = _step_cells(logs, state)
        if "num_tokens" in logs:
            cells["tokens/s"] = numbers.integer(self._tokens_per_second(logs)).rjust(8)
        began, first = self._began
        each = (time.perf_counter() - began) / max(1, state.global_step - first)
        left = (state.max_steps - state.global_step) * each
        cells["left"] = (numbers.duration(left) if left > 0 else "").rjust(11)
        if list(cells) != self._columns:
            self._columns = list(cells)
            say("  ".join(name.rjust(len(cell)) for name, cell in cells.items()))
        say("  ".join(cells.values()).rstrip())

    def _tokens_per_second(self, logs: Mapping[str, Any]) -> float | None:
        """Tokens trained on in each second since the last line."""
        now, (then, seen) = time.perf_counter(), self._counted
        tokens = float(logs.get("num_tokens", 0))
        self._counted = (now, tokens)
        return (tokens - seen) / (now - then) if tokens > seen and now > then else None

    def _say_evaluated(self, step: int, loss: float) -> None:
        line = f"step {step}: held-out loss {loss:.4f}"
        if self._first_evaluated is None:
            self._first_evaluated = (step, loss)
        else:
            then, before = self._first_evaluated
            line += f", learned {before - loss:+.4f} nats since step {then}"
        say(line)

    def _look_for_explosion(self, state: TrainerState, model: nn.Module, rate: float) -> None:
        losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        words = getattr(unwrapped(model).config, "vocab_size", None)
        if not has_exploded(losses, words):
            return
        write_logs({EXPLODED: 1.0}, {}, state)
        if self.shown:
            logger.warning(
                "the loss exploded: it was %.3g at first and %.3g nats per token at the end, so "
                "the learning rate %.3g is too high. What was trained is of no use; train again "
                "with a smaller --learning-rate, a tenth of it",
                losses[0],
                losses[-1],
                rate,
            )


def _step_cells(logs: Mapping[str, Any], state: TrainerState) -> dict[str, str]:
    """Heading -> what stands under it, as wide as its column."""
    digits = len(str(state.max_steps))
    step = f"{state.global_step}/{state.max_steps}"
    cells = {"step": step.rjust(max(8, 2 * digits + 1))}
    for heading, key, width, form in (*COLUMNS, *_held_columns(logs)):
        if key in logs:
            cells[heading] = f"{float(logs[key]):{form}}".rjust(width)
        elif heading == RISE[0]:
            cells[heading] = numbers.MISSING.rjust(width)
    return cells


def _held_columns(logs: Mapping[str, Any]) -> list[tuple[str, str, int, str]]:
    """With a budget the column of the rise, which is not known from the first step on, and that of
    what the budget sets; else that of the first of HELD_COLUMNS that is logged.
    """
    for column in (STRENGTH, WEIGHT):
        if column[1] in logs:
            return [RISE, column]
    return [column for column in HELD_COLUMNS if column[1] in logs][:1]


def has_exploded(losses: Sequence[float], words: int | None = None) -> bool:
    """Whether the losses of a log end far above where they began, or above that of a model which
    guesses among all `words` of the vocabulary alike.
    """
    if not losses:
        return False
    first, last = losses[0], losses[-1]
    if not math.isfinite(last):
        return True
    risen = last > first + RISEN_BY and last > RISEN_TIMES * first
    return risen or (words is not None and last > math.log(words) + RISEN_BY)
