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

from torch import nn

from forgetless.budget.probe import Probe
from forgetless.files.budget_json import BudgetReport
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.penalty.callback import PenaltyCallback, add_penalty
from forgetless.penalty.pull import Penalty


@dataclass(frozen=True)
class Holding:
    """Settings of `Penalty` that hold whatever its strength is, and whoever sets that."""

    layers: Any = None
    anchor: str = "base"
    names: str | None = None
    offload: bool = False

    def penalty(
        self, model: nn.Module, importance: Importance, strength: float, *, shard: bool = False
    ) -> Penalty:
        """A penalty with these settings. Raises as `Penalty` does."""
        return Penalty(
            model,
            importance,
            strength=strength,
            layers=self.layers,
            anchor=self.anchor,
            names=self.names,
            offload=self.offload,
            shard=shard,
        )

    def add_penalty(
        self, trainer: Any, importance: Importance, strength: float = 0.0
    ) -> PenaltyCallback:
        """Add the penalty to a trainer; in several processes each holds its shard of it."""
        shard = distributed.running()
        return add_penalty(trainer, self.penalty(trainer.model, importance, strength, shard=shard))


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
