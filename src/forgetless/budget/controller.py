"""The controller: how hard to hold while training, so that the general loss ends at the budget.

    log strength = log start + integral + GAIN e        (UNUSED_GAIN e below UNUSED)
    integral    += INTEGRAL_GAIN e,  e = log(rise / budget), limited: dual ascent in log space

It sees an energy at every look, which is the penalty's or the divergence of the loss's own term,
and a noisy probe of the rise at some. What is called strength is whatever it sets: the strength of
a pull, or the weight of a divergence. Pure numbers, no model.

    controller = Controller(target=0.00995, start=10.0, unit=1.0)
    controller.update(step=5, energy=0.004)              # the strength to go on with
    controller.update(step=10, energy=0.005, probe=0.006)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from forgetless.files.budget_json import ControllerLook
from forgetless.files.untrusted import JsonObject


@dataclass(frozen=True)
class ControllerState:
    """What changes in a controller while training, and so is kept in a checkpoint."""

    start: float | None
    integral: float
    rise: float | None
    rises: float
    energies: float
    trajectory: list[ControllerLook]

    @staticmethod
    def of(plain: JsonObject) -> ControllerState:
        """The state that a checkpoint holds as JSON."""
        looks = [ControllerLook(**look) for look in plain["trajectory"]]
        return ControllerState(**{**plain, "trajectory": looks})


@dataclass
class Controller:
    """The strength that keeps the general loss at the budget, from few noisy probes of its rise and
    the penalty's exact energy.

    A probe of some hundred tokens may err by more than the budget, but the rise is close to
    proportional to the energy, which costs next to nothing: so all probes so far say what a unit of
    energy costs (sum of rises / sum of energies, the last weighing most), and the strength follows
    rise = that * energy, at probes and between them. What a unit costs is known before the first
    probe (`unit`): about 1 for importance in nats (it is a Fisher), for other importance what the
    random update cost that the reach was measured with (keeper.py). One imagined probe at the
    budget with that cost steadies the first real ones, and no estimate goes below half of it, which
    noise alone says.

    e = log(rise / target), within [-4, 1.5], and above -1 at the first look, -2 at the second: one
    lucky probe must not let go of everything. Near the budget the proportional part is gentle: an
    overshoot early in training, at a high learning rate, is not what is left of it in the end, and
    holding as hard as it asks for undoes the learning (LOG.md, 2026-11-26). While the budget is
    unused it takes the strength to start * exp(-5.6): nothing is held back. The integral moves
    within [-7, 12], by at most 0.2 down and 0.45 up at a time (anti-windup). Until the first look
    the strength is `start`, since the first steps are the wildest. `start` None: no strength is
    known for this importance; it is set to `price` nats of domain loss per nat of general loss, by
    `unit`, or where that is not known either, by the energy that came with the first clear rise,
    until which nothing is held.

    `rise` is the rise by energy at the last look; `rises` and `energies` are the sums over probes,
    discounted.
    """

    target: float
    start: float | None
    unit: float | None = None
    integral: float = 0.0
    rise: float | None = None
    rises: float = 0.0
    energies: float = 0.0
    price: float = 10.0
    catches_up: bool = False
    trajectory: list[ControllerLook] = field(default_factory=list)

    # How much of the error near the budget the strength follows at once, in logs.
    GAIN = 0.5
    # The same while the budget is unused, which lets go of what is not needed.
    UNUSED_GAIN = 1.5
    # How much of the error the integral takes in at each look.
    INTEGRAL_GAIN = 0.3
    # The weight of earlier probes at each new one.
    DISCOUNT = 0.85
    # The least fraction of `unit` that a unit of energy is taken to cost. For a Fisher that is the
    # second-order theory: of finished updates the true rise was below 0.6 of the energy once in
    # twenty.
    LEAST = 0.5
    # log(rise / target) below which the budget counts as unused: two thirds of it.
    UNUSED = -0.4
    # log(rise / target) beyond which the strength catches up: twice the budget.
    CAUGHT_UP = 0.7
    # The most that the integral lets a weight become, in logs: a hundred times what it starts at.
    # On a tiny model at a high rate, two thousand times the weight did not lower the divergence
    # below what single steps of Adam cost, and nothing was learned any more.
    MOST_WEIGHT = 4.6
    # How much of what is beyond the integral takes in at each look. In the bowl of
    # tests/test_budget.py, 50 steps at budgets of a thirtieth and a hundredth of what is lost
    # without holding, rises ended at .82 to 1.31 of the budget with it, at 1.2 to 2.35 without, and
    # at .4 to 1.1 with twice as much, which learned as little as half.
    CATCH_UP = 0.3

    def __post_init__(self) -> None:
        if self.unit is not None:
            self.rises = self.target
            self.energies = self.target / self.unit
            self.start = self.start or 2 * self.price * self.unit

    def update(self, step: int, energy: float, probe: float | None = None) -> float:
        """The strength to go on with at `energy` (sum of c * energy), where a probe may have found
        a rise.
        """
        if probe is not None:
            self.rises = self.DISCOUNT * self.rises + probe
            self.energies = self.DISCOUNT * self.energies + energy
        # Counted before the error is taken, which is limited by the number of looks.
        self.trajectory.append(ControllerLook(step, probe))
        if self.energies > 0:
            self._follow(energy, probe)
        self.trajectory[-1] = replace(self.trajectory[-1], rise=self.rise, strength=self.strength())
        return self.strength()

    def _follow(self, energy: float, probe: float | None) -> None:
        """Set the rise that this energy stands for, the start where it was not known, and the
        integral.
        """
        least = self.LEAST * self.unit if self.unit is not None else -math.inf
        self.rise = max(self.rises / self.energies, least) * energy
        unknown = self.start is None and probe is not None and energy > 0
        if unknown and min(probe or 0.0, self.rise) > 0.1 * self.target:
            self.start = 2 * self.price * self.rise / energy
        if self.start is not None:
            error = self._error()
            moved = self.integral + self.INTEGRAL_GAIN * min(1.5, max(-0.7, error))
            if self.catches_up:
                moved += self.CATCH_UP * max(0.0, error - self.CAUGHT_UP)
            most = self.MOST_WEIGHT if self.catches_up else 12.0
            self.integral = min(most, max(-7.0, moved))

    def strength(self) -> float:
        """The strength now; 0 until a start is known."""
        if self.start is None:
            return 0.0
        error = 0.0 if self.rise is None else self._error()
        return self.start * math.exp(
            self.integral
            + self.GAIN * max(error, self.UNUSED)
            + self.UNUSED_GAIN * min(0.0, error - self.UNUSED)
        )

    def _error(self) -> float:
        ratio = (self.rise or 0.0) / self.target
        most = 3.0 if self.catches_up else 1.5
        return min(most, max(-4.0, -float(len(self.trajectory)), math.log(max(ratio, 1e-9))))

    def state(self) -> ControllerState:
        """What a checkpoint holds."""
        return ControllerState(
            start=self.start,
            integral=self.integral,
            rise=self.rise,
            rises=self.rises,
            energies=self.energies,
            trajectory=list(self.trajectory),
        )

    def restore(self, state: ControllerState) -> None:
        """Go on from `state`."""
        self.start, self.integral, self.rise = state.start, state.integral, state.rise
        self.rises, self.energies = state.rises, state.energies
        self.trajectory = list(state.trajectory)
