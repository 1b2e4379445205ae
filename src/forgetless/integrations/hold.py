"""hold(): one line before `trainer.train()`, and the model is held by what importance marks.

    importance = forgetless.Importance.load("model.importance.safetensors")
    held = forgetless.hold(trainer, importance)          # any transformers or TRL trainer
    trainer.train()
    held.penalty.energy()                                # how far important weights moved, in nats

    with forgetless.hold(trainer, importance, budget="1%", general="general.jsonl") as held:
        trainer.train()
    held.verdict                                         # met, not shown, exceeded

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
from forgetless.integrations.held import (
    HeldModel,
    let_go_of_earlier,
    rows_about,
    warn_of_float16,
)
from forgetless.model import engine
from forgetless.options.estimators import default_strength
from forgetless.penalty.callback import PenaltyCallback
from forgetless.penalty.pull import Penalty
from forgetless.report.terminal import say


class HoldCallback(PenaltyCallback):
    """`hold` as a callback, for hosts that take callbacks before there is a trainer, such as
    LLaMA-Factory or a list in a configuration.

    The penalty is made of the trainer's model when training begins. The arguments are those of
    `hold` but a budget, which needs the trainer. Raises, when training begins, ValueError where
    importance does not fit the model, OptionError for wrong settings.
    """

    penalty: Penalty
    made_by_hold = True

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
        if state.is_world_process_zero:
            about = dict(rows_about(self.penalty))
            say(
                f"forgetless: holds {about['weights']} by {about['importance']}, strength "
                f"{about['strength']}, anchor {about['anchor']}"
            )
            warn_of_float16(args, kwargs["model"])


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
    allow_recorded_text: bool = False,
) -> HeldModel:
    """Hold `trainer.model` while it trains; returns what holds it (held.py).

    It says what it holds when training begins, prints as a short table, and its `.penalty` tells
    the energy. As a context manager it finishes a budget and lets go by itself. A trainer that was
    held already is held anew, by the last call alone. TensorBoard and the console show its
    numbers. Without `strength` it is what suits the importance's
    estimator (options/estimators.py). `layers`, `anchor`, `names` and `offload` are as in
    `Penalty`.

    With `budget` ("1%" of perplexity on the text `general`, or "0.01nats") the strength is
    controlled while training, and after `trainer.train()` its `finish()` scales the update, checks
    it and reports (docs/budget.md). Without `general` the rise is predicted by the
    importance's calibration, and the verdict is `predicted`. Text that importance was recorded on
    is refused, unless with `allow_recorded_text`.

    In several processes every one calls `hold` and keeps its shard of the importance
    (docs/scaling.md). Raises ValueError where importance does not fit the model, the text cannot
    show the budget or the engine cannot be held under (DeepSpeed, FSDP 1), OptionError for wrong
    settings.
    """
    _check_trainer(trainer, budget, general)
    loaded = _loaded(importance)
    holding = Holding(layers=layers, anchor=anchor, names=names, offload=offload)
    before = list(trainer.callback_handler.callbacks)
    if budget is not None:
        keeper = of_trainer(
            trainer, budget, general, loaded, names, recorded_text=allow_recorded_text
        )
        pulling = keeper.bind(trainer, loaded, holding, start=strength).held
        assert pulling is not None  # nothing but a pull holds here
    else:
        pulling = holding.add_penalty(trainer, loaded, _suitable(strength, loaded))
    held = HeldModel(trainer, pulling, budget, general)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, held)
    held.own([one for one in callbacks if not any(one is other for other in before)])
    let_go_of_earlier(trainer, before)
    return held


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
