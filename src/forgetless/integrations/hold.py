"""hold(): one line before `trainer.train()`, and the model is held by what importance marks.

    importance = forgetless.Importance.load("model.importance.safetensors")
    callback = forgetless.hold(trainer, importance)      # any transformers or TRL trainer
    trainer.train()
    callback.penalty.energy()                            # how far important weights moved, in nats

    callback = forgetless.hold(trainer, importance, budget="1%", general="general.jsonl")
    trainer.train()
    callback.finish()["verdict"]                         # met, not shown, exceeded

`HoldCallback` does the first of the two where there is no trainer yet to give it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from forgetless.budget.held import Holding
from forgetless.budget.open import of_trainer
from forgetless.errors import OptionError
from forgetless.importance.importance import Importance
from forgetless.model import engine
from forgetless.options.estimators import default_strength
from forgetless.penalty.callback import PenaltyCallback
from forgetless.penalty.pull import Penalty


class HoldCallback(PenaltyCallback):
    """`hold` as a callback, for hosts that take callbacks before there is a trainer, such as
    LLaMA-Factory or a list in a configuration.

    The penalty is made of the trainer's model when training begins. The arguments are those of
    `hold` but a budget, which needs the trainer. Raises, when training begins, ValueError where
    importance does not fit the model, OptionError for wrong settings.
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
        self.importance = _loaded(importance)
        self.strength = _suitable(strength, self.importance)
        self.holding = Holding(layers=layers, anchor=anchor, names=names, offload=offload)
        self.finishing = self._attachment = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.penalty = self.holding.penalty(kwargs["model"], self.importance, self.strength)
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
    """Hold `trainer.model` while it trains; returns the callback that does it.

    The callback comes first among the trainer's, so that TensorBoard and the console show its
    numbers; its `.penalty` tells the energy. Without `strength` it is what suits the importance's
    estimator (options/estimators.py). `layers`, `anchor`, `names` and `offload` are as in
    `Penalty`.

    With `budget` ("1%" of perplexity on the text `general`, or "0.01nats") the strength is
    controlled while training, and after `trainer.train()` the callback's `finish()` scales the
    update, checks it and reports (docs/budget.md). Without `general` the rise is predicted by the
    importance's calibration, and the verdict is `predicted`.

    In several processes every one calls `hold` and keeps its shard of the importance
    (docs/scaling.md). Raises ValueError where importance does not fit the model, the text cannot
    show the budget or the engine cannot be held under (DeepSpeed, FSDP 1), OptionError for wrong
    settings.
    """
    _check_trainer(trainer, budget, general)
    loaded = _loaded(importance)
    holding = Holding(layers=layers, anchor=anchor, names=names, offload=offload)
    if budget is not None:
        keeper = of_trainer(trainer, budget, general, loaded, names)
        held = keeper.bind(trainer, loaded, holding, start=strength).held
        assert held is not None  # nothing but a pull holds here
        return held
    return holding.add_penalty(trainer, loaded, _suitable(strength, loaded))


def _check_trainer(trainer: Any, budget: str | None, general: str | None) -> None:
    """Refuse text without a budget, and engines under which nothing can be held or measured."""
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


def _loaded(importance: Importance | str | Path) -> Importance:
    """The importance, read from a file, a folder or the Hub where it is a name."""
    if isinstance(importance, Importance):
        return importance
    return Importance.from_pretrained(importance)


def _suitable(strength: float | None, importance: Importance) -> float:
    """The strength, or where None is given what suits the importance's estimator."""
    if strength is not None:
        return strength
    return default_strength(importance.info.get("estimator", "?"))
