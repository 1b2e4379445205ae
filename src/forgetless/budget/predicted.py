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

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from forgetless.budget.baseline import PlannedBound
from forgetless.budget.budget import Budget
from forgetless.budget.controller import Controller
from forgetless.budget.finish import keep_predicted
from forgetless.budget.held import Grip, HeldDivergence, Holding, grip_of, steer
from forgetless.budget.learning import Learning
from forgetless.budget.probe import Probe
from forgetless.errors import OptionError
from forgetless.evaluate.rise import Rise
from forgetless.files.budget_json import BudgetReport
from forgetless.files.schema import GENERAL
from forgetless.importance.calibration import COVERED, Calibration, usual_strength
from forgetless.importance.importance import Importance
from forgetless.model.update import Update
from forgetless.model.weights import FullWeight
from forgetless.options.estimators import known
from forgetless.penalty.pull import Penalty

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Forecast:
    """What a baseline answers by measuring, said by the update that the model carries alone.

    `gauge` knows the energy of that update, anchored at the base.
    """

    budget: Budget
    calibration: Calibration
    gauge: Penalty

    def rise(self) -> float:
        """The predicted rise now, in nats per token."""
        return self.calibration.rise(self._first(), self.gauge.energy(together=True, alike=True))

    def planned(self, model: nn.Module, *, error: float) -> PlannedBound:
        """The predicted rise with the interval of one more update, and its bound; `error` is of
        measurements, and not used.
        """
        first = self._first()
        energy = self.gauge.energy(together=True, alike=True)
        calibration = self.calibration
        second = calibration.cost * energy
        bound = calibration.bound(first, energy)
        rise = Rise(
            nats=calibration.rise(first, energy),
            standard_error=second * (calibration.error - 1),
            low=min(first, 0.0) + second / calibration.factor,
            high=bound,
            error=2 * (1 - COVERED),
            by="update",
            clusters=calibration.used,
            effective=float(calibration.used),
            documents=0,
        )
        return PlannedBound(rise, bound, GENERAL)

    def _first(self) -> float:
        return self.calibration.first(self.gauge.weights)


class Predictor:
    """Keeps the budget of one run by prediction, as `keeper.Keeper` does by measuring: `bind`
    before training, `finish` after it.
    """

    def __init__(self, budget: Budget, calibration: Calibration, learning: Learning | None):
        self.budget = budget
        self.calibration = calibration
        self.learning = learning

    def bind(
        self,
        trainer: Any,
        importance: Importance | None,
        holding: Holding,
        *,
        start: float | None = None,
        divergence: HeldDivergence | None = None,
        pulls: bool = True,
    ) -> Grip:
        """Add penalty and controller to the trainer.

        `start`: the strength to begin at; None: what suits the importance. `divergence`: a term of
        the loss whose weight is set too; with `pulls` False alone, so that the penalty only knows
        the energy.
        """
        assert importance is not None  # it holds the calibration
        self.update = Update(trainer.model, names=holding.names)
        _check_seen(trainer.model, self.update, holding.anchor)
        held = holding.add_penalty(trainer, importance)
        self.forecast = Forecast(self.budget, self.calibration, held.penalty)
        start = start or usual_strength(importance.info, self.calibration.cost)
        grip, start = grip_of(held if pulls else None, divergence, start, own=False)
        controller = Controller(self.budget.nats, start, 1.0)
        self.probe = Probe(controller, grip, cost=self.forecast.rise)
        steer(trainer, grip, self.probe, self.finish)
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
        return grip

    def finish(self, trainer: Any) -> BudgetReport:
        """Scale the model's update to what the prediction allows; what run.json has under
        `budget`.
        """
        self.update.keep()
        ways = {"scale": self.update.scale}
        report = keep_predicted(self.forecast, trainer.model, ways, self.learning)
        history = self.probe.history(trainer.state)
        return replace(report, trajectory=history.trajectory, probe=history.costs)


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
