"""How the model of a budget is held: by a penalty that pulls at strength 0 until the controller
says more, by the weight of a divergence from the base, or by both in a fixed ratio; and the probe
that tells the controller what was lost.

    grip = Grip(Holding(anchor="base").add_penalty(trainer, importance))
    grip.set(30.0)                           # the strength of the pull, from the next step on
    steer(trainer, grip, Probe(controller, grip), keeper.finish)
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from forgetless.files.budget_json import BudgetReport, ControllerLook
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.options.estimators import default_strength
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


class WeightedTerm(Protocol):
    """A divergence from the base in the loss, as methods/kl.py has it: `last` holds nats and tokens
    of its last steps, `recent` is their mean.
    """

    weight: float
    last: deque[tuple[float, int]]

    def recent(self) -> float | None: ...


@dataclass(frozen=True)
class HeldDivergence:
    """A divergence whose weight a budget sets; `own`: it is taken on what the base itself says."""

    term: WeightedTerm
    own: bool


@dataclass(frozen=True)
class Grip:
    """What holds the model, and how hard.

    One number sets all of it: the strength of the pull, and `ratio` times as much is the weight of
    the divergence. Without a pull it is that weight, and `ratio` is 1. `by_term`: what the
    divergence measures says what is lost, else the energy of the pull does.
    """

    held: PenaltyCallback | None = None
    divergence: HeldDivergence | None = None
    ratio: float = 1.0
    by_term: bool = False

    def set(self, strength: float) -> None:
        """Hold this hard from the next step on."""
        if self.held is not None:
            self.held.penalty.strength = strength
        if self.divergence is not None:
            self.divergence.term.weight = strength * self.ratio

    def energy(self) -> float | None:
        """What says at every look what is lost: the mean divergence of the last sequences that the
        term saw, or the energy of the pull; None where nothing has been seen yet.
        """
        if not self.by_term:
            assert self.held is not None
            return self.held.penalty.energy(together=True)
        assert self.divergence is not None
        seen = self.divergence.term.recent()
        # By what is stored a small divergence may come out below nothing.
        return None if seen is None else float(distributed.collect(max(seen, 0.0))[0])

    def logs(self) -> dict[str, float]:
        """How hard the model is held now, as the log has it."""
        numbers = {}
        if self.held is not None:
            numbers["budget/strength"] = self.held.penalty.strength
        if self.divergence is not None:
            numbers["budget/kl_weight"] = self.divergence.term.weight
        return numbers

    def described(self, look: ControllerLook) -> ControllerLook:
        """A look as run.json has it, which tells strength and weight apart."""
        if look.strength is None or self.divergence is None:
            return look
        weight = look.strength * self.ratio
        return replace(look, strength=look.strength if self.held else None, kl_weight=weight)


def grip_of(
    held: PenaltyCallback | None,
    divergence: HeldDivergence | None,
    start: float | None,
    *,
    own: bool,
) -> tuple[Grip, float | None]:
    """The grip of a budget, and the strength that it starts at, None where that is not known yet.

    `start` is the strength that was asked for; the weight that the divergence has is what was asked
    for it. `own`: the budget is kept on what the base says itself.
    """
    if divergence is None:
        return Grip(held), start
    by_term = held is None or (own and divergence.own)
    if held is None:
        return Grip(None, divergence, by_term=by_term), divergence.term.weight
    if start is None:
        start = default_strength(held.penalty.importance.info.get("estimator", "?"))
    return Grip(held, divergence, divergence.term.weight / start, by_term), start


def steer(trainer: Any, grip: Grip, probe: Any, finish: Callable[[Any], BudgetReport]) -> None:
    """Let a probe say how hard to hold while training, before any other callback sees a step, and
    `finish` make the trained update fit.
    """
    trainer.callback_handler.callbacks.insert(0, probe)
    if grip.held is not None:
        grip.held.finishing = functools.partial(finish, trainer)
