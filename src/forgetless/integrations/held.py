"""What `hold` gives back: it says what it holds, and finishes the budget where there is one.

    held = forgetless.hold(trainer, importance, budget="1%", general="text.jsonl")
    print(held)                                  # a short table; a notebook shows it by itself
    trainer.train()
    held.finish()["verdict"]                     # before the model is saved

    with forgetless.hold(trainer, importance) as held:   # finishes and lets go by itself
        trainer.train()

It holds nothing itself: the pull is a `PenaltyCallback`, and a budget adds a probe to it. It knows
which callbacks belong together, so that a second `hold` takes the first one's place.
"""

from __future__ import annotations

import html
import logging
import weakref
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from forgetless.files.untrusted import JsonObject
from forgetless.model import engine
from forgetless.model.linear import unwrapped
from forgetless.model.packing import check_packing
from forgetless.penalty.callback import PenaltyCallback
from forgetless.penalty.pull import Penalty
from forgetless.report.terminal import say, table

logger = logging.getLogger("forgetless")


class HeldModel(TrainerCallback):
    """A trainer's model as it is held, by `forgetless.hold`.

    Attributes:
        penalty: the `Penalty` that pulls; `penalty.energy()` is how far important weights moved.
        budget: the budget as it was given ("1%"), None without one.
        report: what `finish` returned, None before it.
    """

    def __init__(
        self, trainer: Any, pulling: PenaltyCallback, budget: str | None, general: str | None
    ):
        self.trainer = trainer
        self.budget = budget
        self.general = general
        self.report: JsonObject | None = None
        self._pulling = pulling
        self._callbacks: list[Any] = []
        self._in_block = self._trained = self._released = False
        self._watch: Any = None

    @property
    def penalty(self) -> Penalty:
        return self._pulling.penalty

    def finish(self) -> JsonObject:
        """After training with a budget: scale the update to what keeps it, and check it.

        Returns the report as run.json has it, whose `["verdict"]` is met, not shown or exceeded, or
        predicted where there is no general text; called again, the same report. Raises ValueError
        where no budget is kept, and where another `hold` has taken the place of this one.
        """
        if self.report is not None:
            return self.report
        if self._released:
            raise ValueError(
                "this hold was let go of: another hold of the same trainer has taken its place, or "
                "its `with` block has ended; call finish() on the last one"
            )
        self._unwatch()
        self.report = self._pulling.finish()
        return self.report

    def close(self) -> None:
        """Let go of the trainer: its callbacks are as they were before `hold`."""
        self._pulling.close()
        self._unwatch()
        self._released = True
        callbacks = self.trainer.callback_handler.callbacks
        callbacks[:] = [one for one in callbacks if not any(one is own for own in self._callbacks)]

    def own(self, callbacks: list[Any]) -> None:
        """Take note of the callbacks that `hold` has added to the trainer, this one among them."""
        self._callbacks = callbacks

    def __enter__(self) -> HeldModel:
        self._in_block = True
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        unfinished = self.budget is not None and self.report is None
        try:
            if kind is None and unfinished and self._trained:
                self.finish()
                logger.info("budget %s: %s", self.budget, self.verdict)
        finally:
            self.close()

    @property
    def verdict(self) -> str | None:
        """met, not shown, exceeded or predicted; None before `finish`."""
        return None if self.report is None else str(self.report["verdict"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trained = True
        self.report = None
        self._unwatch()
        if state.is_world_process_zero:
            say(f"forgetless: {self._line()}")
            warn_of_float16(args, kwargs["model"])
            warn_of_packing(self.trainer, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.budget is None or self._in_block or self._released:
            return
        if state.is_world_process_zero:
            logger.warning("training has ended, and %s", self.unfinished())
            self._watch = self.trainer.model.register_state_dict_pre_hook(SaveWatch(self))

    def unfinished(self) -> str:
        """What is still to be done for the budget."""
        return (
            f"the budget of {self.budget} is not kept yet: call finish() on what hold() returned, "
            "before the model is saved, or train in `with forgetless.hold(...):`"
        )

    def _unwatch(self) -> None:
        """Save without a warning from now on."""
        if self._watch is not None:
            self._watch.remove()
        self._watch = None

    def _line(self) -> str:
        """'holds 14 weights by kronecker importance (...), strength 10, anchor base'."""
        about = dict(self.rows())
        how = f"budget {about['budget']}" if self.budget else f"strength {about['strength']}"
        return f"holds {about['weights']} by {about['importance']}, {how}, anchor {about['anchor']}"

    def rows(self) -> list[tuple[str, str]]:
        """What is held and how: (name, value), for the table."""
        return [*rows_about(self.penalty, self.budget, self.general), ("state", self._state())]

    def _state(self) -> str:
        """How far it has come."""
        if self.report is not None:
            return f"finished: {self.verdict}"
        if self._released:
            return "let go"
        if not self._trained:
            return "not trained yet"
        if self.budget is not None and self.trainer.state.global_step > 0:
            return f"step {self.trainer.state.global_step}, finish() to come"
        return f"step {self.trainer.state.global_step}"

    def __repr__(self) -> str:
        return f"<{self._line()}; {self._state()}>"

    def __str__(self) -> str:
        return table(["held", ""], self.rows())

    def _repr_html_(self) -> str:
        """The table, as a notebook shows it."""
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table><caption>held by forgetless</caption>{cells}</table>"


class SaveWatch:
    """A hook on a model that is about to be saved, which says that its budget is not kept yet.

    It knows what holds the model weakly, and a copy of the model, or one that is pickled, watches
    nothing.
    """

    def __init__(self, held: HeldModel | None = None):
        self._held = None if held is None else weakref.ref(held)

    def __call__(self, *_: Any) -> None:
        held = self._held() if self._held is not None else None
        if held is not None:
            logger.warning("the model is being saved, and %s", held.unfinished())

    def __reduce__(self) -> tuple[type[SaveWatch], tuple[()]]:
        return SaveWatch, ()


def rows_about(
    penalty: Penalty, budget: str | None = None, general: str | None = None
) -> list[tuple[str, str]]:
    """What a penalty holds and how: (name, value)."""
    kinds = sorted({weight.kind for weight in penalty.weights})
    shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else "")
    rows = [
        ("weights", f"{len(penalty.weights)} weights ({shown})"),
        ("importance", penalty.importance.in_words()),
        ("strength", f"{penalty.strength:.4g}"),
        ("anchor", penalty.anchor),
        ("layers", repr(penalty.rule)),
        ("pull", penalty.implementation),
    ]
    if budget is not None:
        kept_on = f"on {general}" if general else "on a prediction"
        rows.insert(2, ("budget", f"{budget} {kept_on}"))
    if logged := penalty.logs():
        rows.append(("energy", f"{logged['energy']:.4g} at the last step"))
    return rows


def warn_of_float16(args: TrainingArguments, model: nn.Module) -> None:
    """Say where a model is trained in plain float16, whose small gradients are lost."""
    in_half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    if in_half and not args.fp16 and not args.bf16:
        logger.warning(
            "the model is in float16 and is trained without loss scaling, so that small gradients "
            "are lost; load it with dtype=torch.bfloat16 or torch.float32, or train with fp16=True"
        )


def warn_of_packing(trainer: Any, model: nn.Module) -> None:
    """Say where a trainer of TRL packs documents that read each other in this model."""
    if not getattr(trainer, "padding_free", False) or not engine.has_whole_model(trainer):
        return
    try:
        check_packing(unwrapped(model))
    except ValueError as error:
        logger.warning("%s", error)


def let_go_of_earlier(trainer: Any, before: list[Any]) -> None:
    """Where a trainer was held already, by `hold` or `HoldCallback`, undo that and say so.

    `before` are its callbacks as they were.
    """
    for callback in before:
        if isinstance(callback, HeldModel):
            callback.close()
        elif isinstance(callback, PenaltyCallback) and callback.made_by_hold:
            callback.close()
            trainer.callback_handler.callbacks.remove(callback)
        else:
            continue
        logger.warning("this trainer was held already: the new hold takes the place of the old one")
