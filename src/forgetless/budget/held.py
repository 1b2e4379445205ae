"""How the model of a budget is held: a penalty that pulls at strength 0 until the controller says
more, and the probe that tells the controller what was lost.

    held = Holding(anchor="base").add_penalty(trainer, importance)
    steer(trainer, held, Probe(controller, held.penalty), keeper.finish)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forgetless.budget.probe import Probe
from forgetless.files.budget_json import BudgetReport
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.penalty.callback import PenaltyCallback, add_penalty
from forgetless.penalty.pull import Penalty


@dataclass(frozen=True)
class Holding:
    """Settings of `Penalty` that a budget leaves to whoever asks for it."""

    layers: Any = None
    anchor: str = "base"
    names: str | None = None
    offload: bool = False

    def add_penalty(self, trainer: Any, importance: Importance) -> PenaltyCallback:
        """Add the penalty to a trainer; in several processes each holds its shard of it."""
        penalty = Penalty(
            trainer.model,
            importance,
            strength=0.0,
            layers=self.layers,
            anchor=self.anchor,
            names=self.names,
            offload=self.offload,
            shard=distributed.running(),
        )
        return add_penalty(trainer, penalty)


def steer(
    trainer: Any,
    held: PenaltyCallback,
    probe: Probe,
    finish: Callable[[Any], BudgetReport],
) -> None:
    """Let a probe set the strength while training, before any other callback sees a step, and
    `finish` make the trained update fit.
    """
    trainer.callback_handler.callbacks.insert(0, probe)
    held.finishing = functools.partial(finish, trainer)
