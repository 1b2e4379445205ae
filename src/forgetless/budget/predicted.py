"""A budget kept on a prediction: for `tune --budget` without `--general`, with an importance file
that holds a calibration (importance/calibration.py).

while training   the strength follows the predicted rise, which the update alone says; nothing is
                 probed
after            the update is scaled to the most learning whose bound keeps the budget: the rise
                 that 19 of 20 updates like the calibrated ones stay below. It is not shrunk along
                 importance: that takes away energy on purpose, and what energy predicts holds for
                 updates that training left
verdict          predicted, never met: no general text was looked at
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.budget.budget import Budget
from forgetless.budget.controller import Controller
from forgetless.budget.finish import Learning, keep_predicted
from forgetless.budget.probe import Probe
from forgetless.errors import OptionError
from forgetless.evaluate.rise import Rise
from forgetless.files.schema import GENERAL
from forgetless.importance.calibration import COVERED, Calibration, usual_strength
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.update import Update
from forgetless.model.weights import FullWeight
from forgetless.options.estimators import known
from forgetless.penalty.callback import PenaltyCallback, add_penalty
from forgetless.penalty.pull import Penalty

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Forecast:
    """What a ledger answers by measuring, by the update that the model carries alone.

    `gauge` knows its energy, anchored at the base.
    """

    budget: Budget
    calibration: Calibration
    gauge: Penalty

    def rise(self) -> float:
        """The predicted rise now, in nats per token."""
        return self.calibration.rise(self._first(), self.gauge.energy(together=True, alike=True))

    def planned(self, model: nn.Module, *, error: float) -> tuple[Rise, float, str]:
        """(predicted rise with the interval of one more update, its bound, whose it is); `error` is
        of measurements, and not used.
        """
        first, energy = self._first(), self.gauge.energy(together=True, alike=True)
        known, made = self.calibration, self.calibration.used
        rise, bound, second = (
            known.rise(first, energy),
            known.bound(first, energy),
            known.cost * energy,
        )
        found = Rise(
            rise,
            second * (known.error - 1),
            min(first, 0.0) + second / known.factor,
            bound,
            2 * (1 - COVERED),
            "update",
            made,
            float(made),
            0,
        )
        return found, bound, GENERAL

    def _first(self) -> float:
        return self.calibration.first(self.gauge.weights)


class Predictor:
    """Keeps the budget of one run by prediction; as `keeper.Keeper`:

    `bind` before training, `finish` after it.
    """

    def __init__(self, budget: Budget, calibration: Calibration, learning: Learning | None):
        self.budget, self.calibration, self.learning = budget, calibration, learning

    def bind(
        self,
        trainer: Any,
        importance: Importance,
        *,
        start: float | None,
        layers: Any,
        anchor: str,
        names: str | None,
        offload: bool = False,
    ) -> PenaltyCallback:
        """Add penalty and controller to the trainer.

        `start`: the strength to begin at; None: what suits the importance.
        """
        self.update = Update(trainer.model, names=names)
        _check_seen(trainer.model, self.update, anchor)
        penalty = Penalty(
            trainer.model,
            importance,
            strength=0.0,  # until the controller sets it
            layers=layers,
            anchor=anchor,
            names=names,
            offload=offload,
            shard=distributed.running(),
        )
        callback = add_penalty(trainer, penalty)
        self.forecast = Forecast(self.budget, self.calibration, callback.penalty)
        start = start or usual_strength(importance.info, self.calibration.cost)
        self.probe = Probe(
            Controller(self.budget.nats, start, 1.0), callback.penalty, cost=self.forecast.rise
        )
        trainer.callback_handler.callbacks.insert(0, self.probe)
        callback.finishing = functools.partial(self.finish, trainer)
        estimator = known(importance.info.get("estimator"))
        if estimator is None or not estimator.predicts:
            logger.warning(
                "predictions by %s importance kept budgets for updates held as it was "
                "calibrated, and not for all others (docs/budget.md); "
                "record kronecker importance",
                importance.info.get("estimator"),
            )
        logger.info(
            "budget %s (%.4g nats) kept on a prediction, nothing is measured: %s",
            self.budget.text,
            self.budget.nats,
            self.calibration.describe(),
        )
        return callback

    def finish(self, trainer: Any) -> dict[str, Any]:
        """Scale the model's update to what the prediction allows; what run.json holds under
        `budget`.
        """
        self.update.keep()
        report = keep_predicted(
            self.forecast, trainer.model, {"scale": self.update.scale}, self.learning
        )
        return {**report, **self.probe.history(trainer.state)}


def _check_seen(model: nn.Module, update: Update, anchor: str) -> None:
    """Raise ValueError where training changes what the prediction does not see, OptionError for an
    anchor that it does not count from.
    """
    seen = {id(parameter) for weight in update.weights for parameter in weight.parameters}
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in seen
    ]
    if others or any(isinstance(weight, FullWeight) for weight in update.weights):
        raise ValueError(
            "without general text a budget is kept on a prediction for LoRA adapters, found "
            f"{others[0] if others else 'weights'} trained itself; "
            "train an adapter alone, or give general text"
        )
    if anchor != "base":
        raise OptionError(
            "without general text a budget is kept on a prediction that counts from the base "
            "model: use anchor 'base', or give general text"
        )


def check_calibrated(importance: Importance | None) -> Calibration:
    """The calibration of `importance`. Raises OptionError where there is none."""
    if importance is None:
        raise OptionError(
            "--budget is kept on held-out general text, or on a prediction: give --general TEXT "
            "(not part of --data), or --importance FILE made "
            "with forgetless record --calibrate"
        )
    if importance.calibration is None:
        where = importance.info.get("path", "the importance")
        raise OptionError(
            f"{where} holds no calibration, which a budget without general text is kept by: give "
            "--general TEXT, or record with --calibrate"
        )
    return importance.calibration
