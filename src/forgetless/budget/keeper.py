"""The budget of one training run, from the first look at the general text to the verdict: what
`tune --budget` and `hold(trainer, budget=...)` add to it.

before training   general text split and measured on the base, overlap with the training data warned
                  of, budgets that it cannot show refused
during            the probe sets the strength
after             the finish scales the update to the most learning that keeps the budget, and
                  checks it

    keeper = Keeper(baseline, learning, shared, tokens_per_step)
    keeper.bind(trainer, importance, Holding(anchor="base"))
    trainer.train()
    report = keeper.finish(trainer)          # a BudgetReport
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from forgetless.budget.baseline import Baseline, Spread
from forgetless.budget.budget import check_reach, showing
from forgetless.budget.controller import Controller
from forgetless.budget.finish import keep_budget
from forgetless.budget.held import Grip, HeldDivergence, Holding, grip_of, steer
from forgetless.budget.learning import Learning
from forgetless.budget.probe import Probe, Rolling, plan_probes
from forgetless.budget.scan import EACH
from forgetless.budget.ways import ways_of
from forgetless.data.duplicates import Overlap
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.evaluate.rise import Rise
from forgetless.files.budget_json import BudgetReport
from forgetless.importance.importance import Importance
from forgetless.model.update import Update
from forgetless.model.weights import FullWeight
from forgetless.options.estimators import known
from forgetless.penalty.pull import Penalty

logger = logging.getLogger("forgetless")


class Keeper:
    """Keeps the budget of one run.

    Made while the model carries no update, then `bind` before training and `finish` after it.
    """

    def __init__(
        self,
        baseline: Baseline,
        learning: Learning | None,
        shared: Overlap,
        tokens_per_step: float,
    ):
        self.baseline = baseline
        self.learning = learning
        self.budget = baseline.budget
        if said := shared.describe():
            logger.warning("%s", said)
        self.overlap = {
            "exact": len(shared.exact),
            "near": len(shared.near),
            "documents": shared.documents,
        }
        self.every, self.count = plan_probes(tokens_per_step, _tokens_probed(baseline))

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
        """Refuse what the text cannot show, then add penalty and probe to the trainer.

        `start`: the strength to begin at; None: what suits the importance. `divergence`: a term of
        the loss whose weight is set too, or with `pulls` False alone.
        """
        self.update = Update(trainer.model, names=holding.names)
        self.shrinkable = importance if self._can_shrink(importance) else None
        spread: Spread | None = None
        # A random update's rise is measured from the model that training starts from.
        if not self.baseline.moved:
            spread = self.baseline.spread(trainer.model, self.update, error=EACH)
            check_reach(spread.rise, len(self.baseline.check), self.budget, error=EACH)
            self._say_what_shows(spread.rise)
        held = None
        if pulls:
            assert importance is not None
            held = holding.add_penalty(trainer, importance)
        own = isinstance(self.baseline.control, PairedAnswers)
        grip, start = grip_of(held, divergence, start, own=own)
        controller = self._controller(grip, start, spread, own=own)
        self.probe = self._probe(trainer.model, controller, grip)
        steer(trainer, grip, self.probe, self.finish)
        logger.info(
            "budget %s (%.4g nats): %d control and %d check documents; %d pieces probed every %d "
            "steps",
            self.budget.text,
            self.budget.nats,
            len(self.baseline.control),
            len(self.baseline.check),
            self.probe.count,
            self.every,
        )
        return grip

    def _say_what_shows(self, spread: Rise) -> None:
        """Say how much of the budget the check lets be used, and how much text more of it takes."""
        own = isinstance(self.baseline.check, PairedAnswers)
        shows = showing(spread, len(self.baseline.check), self.budget, error=EACH, own=own)
        what = "answers (--answers)" if own else "documents"
        logger.info(
            "the check part of %d %s lets at most %.0f %% of the budget be used; %.0f %% takes "
            "about %d, those of the control part not counted",
            len(self.baseline.check),
            what,
            100 * shows.usable,
            100 * shows.wanted,
            shows.documents,
        )

    def _controller(
        self, grip: Grip, start: float | None, spread: Spread | None, *, own: bool
    ) -> Controller:
        """What follows the rise: by the divergence of the loss, which costs its own nats where both
        are of what the base says, or by the energy of the pull.
        """
        if grip.by_term:
            unit = 1.0 if own and grip.divergence is not None and grip.divergence.own else None
            return Controller(self.budget.nats, start, unit, catches_up=True)
        assert grip.held is not None
        penalty = grip.held.penalty
        estimator = known(penalty.importance.info.get("estimator"))
        if estimator is not None and estimator.in_nats:
            return Controller(self.budget.nats, start or estimator.strength, 1.0)
        return Controller(self.budget.nats, start, self._unit(penalty, spread))

    def _can_shrink(self, importance: Importance | None) -> bool:
        """Whether an update can also be made smaller along importance: that of an adapter, by
        importance which differs between weights.
        """
        if importance is None:
            return False
        estimator = known(importance.info.get("estimator"))
        if estimator is not None and estimator.constant:
            return False
        return not any(isinstance(weight, FullWeight) for weight in self.update.weights)

    def _probe(self, model: Any, controller: Controller, grip: Grip) -> Probe:
        """What looks at the general text and the earlier domains while training."""
        return Probe(
            controller,
            grip,
            self.baseline.pieces,
            every=self.every,
            count=self.count,
            guards=[Rolling(guard.control, model) for guard in self.baseline.guards],
            offset=self.baseline.offset(model) if self.baseline.moved else 0.0,
        )

    def _unit(self, penalty: Penalty, spread: Spread | None) -> float | None:
        """Nats of general loss that a unit of energy costs, by the random update of which both were
        measured; None where there is none.
        """
        if spread is None or spread.rise.nats <= 0:
            return None
        try:
            self.update.randomise(spread.size)
            energy = penalty.energy(together=True)
        finally:
            self.update.scale(1)
        return spread.rise.nats / energy if energy > 0 else None

    def finish(self, trainer: Any) -> BudgetReport:
        """Make the model's update fit the budget and check it; what run.json has under `budget`."""
        self.update.keep()
        ways = ways_of(self.update, self.shrinkable)
        report = keep_budget(self.baseline, trainer.model, ways, self.learning)
        history = self.probe.history(trainer.state)
        return replace(
            report,
            trajectory=history.trajectory,
            probe=history.costs,
            overlap=self.overlap,
        )


def _tokens_probed(baseline: Baseline) -> float:
    """Tokens of a probed piece, together with those of a row of every earlier domain: as many of
    both are probed.
    """
    piece = baseline.pieces.mean_length
    rows = [
        float(np.mean([len(ids) for ids, _ in guard.control.encoded])) for guard in baseline.guards
    ]
    return piece + (sum(rows) / len(rows) if rows else 0.0)
