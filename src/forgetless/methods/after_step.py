"""`proximal` and `project`: held by importance after each step of the optimizer, not before it.

    proximal    the pull of `hold`, decoupled from the optimizer as AdamW's weight decay is: the
                quadratic is solved, so that any strength is stable
    project     the update keeps out of the pairs of directions that have --protect of the
                curvature (CrispEdit, arXiv 2602.15823)

Both need Kronecker importance, and hold towards the base. penalty/proximal.py has the formulas. A
step costs thin products of the factors with the eigenvectors, and r x r problems: one for each
factor, or with `project` one for each direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from forgetless.errors import OptionError
from forgetless.importance.entries import KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.methods.method import Setup
from forgetless.model import engine
from forgetless.model.optimizer_step import unwrapped_optimizer, will_skip
from forgetless.model.targets import target_weights
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight, wider
from forgetless.options.tune import TuneOptions
from forgetless.penalty.callback import LoggingCallback
from forgetless.penalty.fit import check_fit
from forgetless.penalty.layers import LayerRule, Uniform
from forgetless.penalty.proximal import Sides, filtered, sides_of


class AfterStep:
    """Holds the update of a model towards the base, whenever `step` is called.

    With `protect` it is projected, else solved with `strength`. Raises ValueError for importance
    that is not Kronecker's or does not fit, and for adapters that start away from the base.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Importance,
        *,
        strength: float = 0.0,
        protect: float | None = None,
        layers: LayerRule | None = None,
        names: str | None = None,
    ):
        self.strength = strength
        self.weights = target_weights(model, names=names)
        targets = [weight.name for weight in self.weights]
        check_fit(model, importance, targets, "base")
        rule = layers or Uniform()
        self.coefficients: dict[str, float] = rule.coefficients(importance.norms(), self.weights)
        moved: dict[Any, Any] = {}
        self._sides: dict[str, Sides] = {}
        for weight in self.weights:
            entry = importance[weight.name]
            if not isinstance(entry, KroneckerEntry):
                raise ValueError(
                    "proximal and project need Kronecker importance, found "
                    f"'{importance.tier}'; record with --estimator kronecker"
                )
            if isinstance(weight, LowRankWeight) and weight.initial is not None:
                raise ValueError(
                    f"the adapter on '{weight.name}' starts away from the base, so its factors are "
                    "not the update; use an adapter that starts at B = 0"
                )
            parameter = weight.parameters[0]
            placed = entry.to(parameter.device, wider(parameter.dtype), moved)
            self._sides[weight.name] = sides_of(placed, protect)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every trained weight as far back as its curvature says."""
        for weight in self.weights:
            t = learning_rate * self.strength * self.coefficients[weight.name]
            if isinstance(weight, FullWeight):
                self._step_of_full(weight, t)
                continue
            dtype = wider(weight.A.dtype)
            A, B = self._sides[weight.name].step(
                weight.A.to(dtype), weight.B.to(dtype), weight.scale, t
            )
            for parameter, value in ((weight.A, A), (weight.B, B)):
                if parameter.requires_grad:
                    parameter.copy_(value)

    def _step_of_full(self, weight: FullWeight, t: float) -> None:
        sides = self._sides[weight.name]
        U = filtered(weight.update(), sides.outputs, sides.inputs, sides.factors(t))
        weight.W.copy_(weight.oriented(weight.base_rows(slice(None)) + U))

    @torch.no_grad()
    def energy(self) -> float:
        """sum_l c_l tr(G U C U^T), as a penalty has it."""
        return sum(
            self.coefficients[weight.name] * self._energy_of(weight) for weight in self.weights
        )

    def _energy_of(self, weight: TargetWeight) -> float:
        sides = self._sides[weight.name]
        if isinstance(weight, LowRankWeight):
            return float(sides.energy(*weight.factors()))
        U = weight.update()
        return float(sides.energy(U, torch.eye(U.shape[1], dtype=U.dtype, device=U.device)))

    def logs(self) -> dict[str, float]:
        """Numbers for the log."""
        return {"energy": self.energy()}


class AfterStepCallback(LoggingCallback):
    """Lets an `AfterStep` act after each step of a trainer's optimizer, and logs its energy."""

    def __init__(self, held: AfterStep):
        self.held = held
        self._handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped_optimizer(kwargs["optimizer"])

        def act(*_: Any) -> None:
            if not will_skip(optimizer):
                self.held.step(float(optimizer.param_groups[0]["lr"]))

        self._handle = optimizer.register_step_post_hook(act)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def logged(self) -> dict[str, float]:
        return self.held.logs()


def add_after_step(trainer: Any, held: AfterStep) -> AfterStepCallback:
    """Let `held` act after each step of `trainer`; raises ValueError where a process has not the
    whole model.
    """
    if not engine.has_whole_model(trainer):
        raise ValueError(
            "proximal and project need the whole model in each process, which "
            f"{engine.engine_of(trainer)} does not give; train in one process or with DDP"
        )
    callback = AfterStepCallback(held)
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def check_towards_base(options: TuneOptions) -> None:
    """Refuse an anchor other than the base."""
    if options.anchor != "base":
        raise OptionError(
            f"--method {options.method} holds towards the base, found --anchor {options.anchor}; "
            "use --anchor base"
        )


def proximal(setup: Setup, model: nn.Module) -> AfterStep | None:
    """The decoupled hold of --importance; None where its strength is 0."""
    return _held(setup, model, strength=setup.options.strength) if setup.options.strength else None


def project(setup: Setup, model: nn.Module) -> AfterStep:
    """The projection by --importance."""
    return _held(setup, model, protect=setup.options.protect)


def _held(setup: Setup, model: nn.Module, **how: Any) -> AfterStep:
    o = setup.options
    assert setup.importance is not None
    names = o.targets if o.full else None
    return AfterStep(model, setup.importance, layers=setup.layers, names=names, **how)
