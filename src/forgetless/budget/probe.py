"""The probe: measures the general loss on a few pieces of control text between steps of a trainer,
and holds as hard as the controller asks for.

Between probes the controller is told the energy alone, or the divergence that the loss has anyway.
A forward pass over a token costs a third to a half of a training step's work on one, so probing 8 %
as many tokens as are trained takes 3 to 4 % of the time. The plan is made in tokens, not in
seconds, so that a run is the same on any machine; what it took is measured and reported. Pieces
rotate, so that over a run all of the control text is used; base losses of the pieces are known. In
a sequence of domains the worst of general text and earlier domains counts. Without pieces nothing
is measured, and `cost` alone says what the update would. Everything that the next step depends on
is in the trainer's checkpoint.

    every, count = plan_probes(tokens_per_step, piece=128)
    probe = Probe(controller, grip, baseline.pieces, every=every, count=count)
    trainer.callback_handler.callbacks.insert(0, probe)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from forgetless.budget.controller import Controller, ControllerState
from forgetless.budget.held import Grip
from forgetless.errors import FileError
from forgetless.evaluate.paired import PairedText
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.files.budget_json import ControllerLook, ProbeCosts
from forgetless.files.untrusted import JsonObject
from forgetless.model import distributed
from forgetless.penalty.callback import LoggingCallback

logger = logging.getLogger("forgetless")
# Tokens that are probed, as a fraction of those that are trained: see above what they cost.
PROBED_FRACTION = 0.08
# Steps between looks at the energy, and at least between probes.
EVERY = 5
# The fewest and the most pieces of a probe: many small probes rather than few large ones, since the
# controller pools them.
FEWEST_PIECES = 2
MOST_PIECES = 64


def plan_probes(tokens_per_step: float, piece: float) -> tuple[int, int]:
    """(steps between probes, pieces per probe) within PROBED_FRACTION, for steps of so many tokens
    and pieces of so many.
    """
    allowed = PROBED_FRACTION * max(tokens_per_step, 1.0) / max(piece, 1.0)  # pieces per step
    every = max(EVERY, int(-(-FEWEST_PIECES // allowed)))
    return every, max(1, min(MOST_PIECES, int(allowed * every)))


def most_pieces(steps: int) -> int:
    """Pieces that a run of so many steps can probe at most."""
    return MOST_PIECES * steps // EVERY + MOST_PIECES


@dataclass(frozen=True)
class History:
    """What the controller did while training, and what the probe cost."""

    trajectory: list[ControllerLook]
    costs: ProbeCosts


class Rolling:
    """The rise on rows of an earlier domain, a few of them measured anew each time and the others
    as they were last. Few tokens are scored in a row, so that the rise of a few rows alone would be
    noise many times the budget.

    `offset` is the rise where training starts.
    """

    # Rows that are followed: as many as a probe has pieces at most.
    ROWS = 64

    def __init__(self, part: PairedText, model: nn.Module):
        self.part = part.some(range(min(self.ROWS, len(part))))
        self.nats = self.part.losses(model)
        self.offset = self.part.rise_without_interval(self.nats)
        self.cursor = 0

    def look(self, model: nn.Module, count: int) -> float:
        """Measure the next `count` rows; the rise of all of them in nats per token."""
        rows = [(self.cursor + i) % len(self.part) for i in range(min(count, len(self.part)))]
        self.cursor = (self.cursor + len(rows)) % len(self.part)
        self.nats[rows] = self.part.some(rows).losses(model)
        return self.part.rise_without_interval(self.nats)


class Probe(LoggingCallback, ExportableState):
    """Sets how hard the model is held from what the general loss does, and logs budget/rise with
    budget/strength and budget/kl_weight.
    """

    def __init__(
        self,
        controller: Controller,
        grip: Grip,
        pieces: PairedText | PairedAnswers | None = None,
        *,
        every: int = EVERY,
        count: int = 0,
        guards: Sequence[Rolling] = (),
        offset: float = 0.0,
        cost: Callable[[], float | None] | None = None,
    ):
        self.controller = controller
        self.grip = grip
        self.pieces = pieces
        self.every = every
        self.count = min(count, len(pieces or ()))
        self.guards = guards
        self.offset = offset
        self.cost = cost or grip.energy
        self.cursor = 0
        self.seconds = 0.0
        self.total_seconds = 0.0
        self._started = 0.0
        grip.set(controller.strength())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()
        if state.global_step:
            self.restore(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        now = state.global_step % self.every == 0
        if not now and state.global_step % EVERY:
            return
        started = time.perf_counter()
        energy = self.cost()
        if energy is None:
            return
        rise = self._measured(kwargs["model"], self.pieces) if now and self.pieces else None
        self.grip.set(self.controller.update(state.global_step, energy, rise))
        self.seconds += time.perf_counter() - started

    def _measured(self, model: Any, pieces: PairedText | PairedAnswers) -> float:
        """The rise on the pieces whose turn it is."""
        part = pieces.some([(self.cursor + i) % len(pieces) for i in range(self.count)])
        self.cursor = (self.cursor + self.count) % len(pieces)
        rise = part.rise_without_interval(part.losses(model))
        each = max(1, self.count // max(1, len(self.guards)))
        used = [self._used(rise, self.offset)]
        used += [self._used(guard.look(model, each), guard.offset) for guard in self.guards]
        # One number for all processes, whatever their hardware rounds to.
        return float(distributed.collect(max(used))[0])

    def _used(self, rise: float, offset: float) -> float:
        """The rise as it would be if all of the budget were still free: where earlier domains have
        used some, the same fraction of what they left.
        """
        return (rise - offset) / max(1 - offset / self.controller.target, 0.1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.total_seconds = time.perf_counter() - self._started
        if self.total_seconds > 60 and self.seconds > 0.05 * self.total_seconds:
            logger.warning(
                "probing the general loss took %.1f %% of the training time, more than planned",
                100 * self.seconds / self.total_seconds,
            )

    def logged(self) -> dict[str, float]:
        mine = self.grip.logs()
        if self.controller.rise is not None:
            mine["budget/rise"] = self.controller.rise
        return mine

    def state(self) -> JsonObject:
        """What a checkpoint holds."""
        return {
            "args": {},
            "attributes": {
                "cursor": self.cursor,
                "controller": asdict(self.controller.state()),
                "divergence": [list(step) for step in self._last_divergences()],
                "guards": [
                    {"cursor": guard.cursor, "nats": guard.nats.tolist()} for guard in self.guards
                ],
            },
        }

    def _last_divergences(self) -> Iterable[tuple[float, int]]:
        """Nats and tokens of the last steps of the divergence, where there is one."""
        return () if self.grip.divergence is None else self.grip.divergence.term.last

    def stored(self, state: TrainerState) -> Any:
        """What a checkpoint held of this callback; None where nothing."""
        return (state.stateful_callbacks or {}).get(type(self).__name__)

    def history(self, state: TrainerState) -> History:
        """For the report; of a finished training that was only loaded, by its checkpoint."""
        if not self.controller.trajectory and self.stored(state):
            self.restore(state)
        costs = ProbeCosts(
            every=self.every if self.pieces else None,
            pieces=self.count if self.pieces else 0,
            seconds=self.seconds,
            train_seconds=self.total_seconds,
        )
        return History([self.grip.described(look) for look in self.controller.trajectory], costs)

    def restore(self, state: TrainerState) -> None:
        """Go on from a checkpoint's state. Raises ValueError where it was made without a budget."""
        stored = self.stored(state)
        if not isinstance(stored, dict) or "attributes" not in stored:
            raise ValueError(
                "the checkpoint holds no state of a budget, so it was made without --budget; "
                "start again with --overwrite"
            )
        try:
            self._go_on_from(stored["attributes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                "the checkpoint's state of the budget is not what forgetless writes there "
                f"({type(error).__name__}: {error}); remove the checkpoint to go on from the one "
                "before it, or start again with --overwrite"
            ) from error
        self.grip.set(self.controller.strength())

    def _go_on_from(self, stored: JsonObject) -> None:
        self.cursor = int(stored["cursor"])
        self.controller.restore(ControllerState.of(stored["controller"]))
        for guard, kept in zip(self.guards, stored.get("guards", []), strict=True):
            guard.cursor, guard.nats = int(kept["cursor"]), np.array(kept["nats"], dtype=float)
        if self.grip.divergence is not None:
            seen = stored.get("divergence", [])
            self.grip.divergence.term.last.extend((nats, tokens) for nats, tokens in seen)
