"""TODO integrations.hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from forgetless.budget.held import Holding
from forgetless.budget.open import of_trainer
from forgetless.errors import OptionError
from forgetless.importance.importance import Importance
from forgetless.model import distributed, engine
from forgetless.options.estimators import default_strength
from forgetless.penalty.callback import PenaltyCallback, add_penalty
from forgetless.penalty.pull import Penalty


class HoldCallback(PenaltyCallback):
    """`hold` as a callback, for hosts that take callbacks before there is a trainer (LLaMA-Factory,
    or a list in a configuration): the penalty is made of the trainer's model when training begins.
    The arguments are those of `hold`, without a budget, which needs the trainer.

    Raises, when training begins, ValueError where importance does not fit the model, OptionError
    for wrong settings.
    """

    penalty: Penalty

    def __init__(
        self,
        importance: Importance | str | Path,
        *,
        strength: float | None = None,
        layers: Any = None,
        anchor: str = "base",
        names: str | None = None,
        offload: bool = False,
    ):
        self.importance = (
            importance
            if isinstance(importance, Importance)
            else Importance.from_pretrained(importance)
        )
        self.strength = (
            default_strength(self.importance.info.get("estimator", "?"))
            if strength is None
            else strength
        )
        self.settings: dict[str, Any] = dict(
            layers=layers, anchor=anchor, names=names, offload=offload
        )
        self.finishing = self._attachment = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty = Penalty(
            kwargs["model"], self.importance, strength=self.strength, **self.settings
        )
        super().on_train_begin(args, state, control, **kwargs)


def hold(
    trainer: Any,
    importance: Importance | str | Path,
    *,
    strength: float | None = None,
    layers: Any = None,
    anchor: str = "base",
    names: str | None = None,
    offload: bool = False,
    budget: str | None = None,
    general: str | None = None,
) -> PenaltyCallback:
    """Hold `trainer.model` while it trains: builds the penalty, and puts its callback first so that
    TensorBoard and the console show its numbers.

    `strength` None takes what suits the importance's estimator (options/estimators.py); the rest is as
    in `Penalty`. Returns the callback; its `.penalty` tells the energy. With `budget` ("1%" of
    perplexity on the text `general`, or "0.01nats") the strength is controlled from there on, and
    `finish()` of the callback scales, checks and reports after `trainer.train()` (docs/budget.md);
    without `general` the rise is predicted by the importance's calibration, and the verdict is
    `predicted`. In several processes each keeps its share of the importance (docs/scaling.md);
    every process calls `hold`. Raises ValueError when importance does not fit the model, the text
    cannot show the budget or the engine cannot be held under (DeepSpeed, FSDP 1), OptionError for
    wrong settings.
    """
    if general is not None and budget is None:
        raise OptionError(
            f"general text is for a budget (budget='1%'), found general={general!r} and no budget"
        )
    engine.check_engine(trainer, "the pull")
    if budget is not None and not engine.has_whole_model(trainer):
        raise ValueError(
            "a budget measures general text beside the trainer, which FSDP does not allow; train "
            "in one process or with DDP, or give a strength"
        )
    loaded = (
        importance if isinstance(importance, Importance) else Importance.from_pretrained(importance)
    )
    if budget is not None:
        keeper = of_trainer(trainer, budget, general, loaded, names)
        holding = Holding(layers=layers, anchor=anchor, names=names, offload=offload)
        return keeper.bind(trainer, loaded, holding, start=strength)
    strength = default_strength(loaded.info.get("estimator", "?")) if strength is None else strength
    penalty = Penalty(
        trainer.model,
        loaded,
        strength=strength,
        layers=layers,
        anchor=anchor,
        names=names,
        offload=offload,
        shard=distributed.running(),
    )
    return add_penalty(trainer, penalty)
