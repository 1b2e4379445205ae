"""Recorders that watch an optimizer: what path estimators share.

A subclass says what one optimizer step is worth, and what remains of it at the end of an epoch.
Around every step an `Attachment` hands the recorder the parameters before it and a gradient of each
weight's effective update U:

    exact       dL/dU = (output gradients)^T @ (inputs), from the backward pass: neither clipped nor
                divided by anything; .grad for full fine-tuning
    effective   s (B gA + gB A - eta gB gA), from the factors' gradients (Song et al. 2025, arXiv
                2501.13669)

    with recorder.attach(optimizer):
        ...train...
        recorder.end_epoch()
    importance = recorder.finish()
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.entries import Entry
from forgetless.importance.importance import Importance
from forgetless.importance.info import Estimate, of_model
from forgetless.model import distributed
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight, TargetWeight, wider
from forgetless.record.attachment import Attachment
from forgetless.record.credits import CreditParts, Credits
from forgetless.record.movement import Gradient, is_finite
from forgetless.record.path_state import PathNumbers, PathState
from forgetless.record.state import StateDict

# The unit of the importance, by the gradient that credits are made of.
UNITS = {"exact": "nats per squared weight", "effective": "arbitrary (effective gradient)"}


class PathRecorder(abc.ABC):
    """A recorder of credits along the path of an optimizer; `PathIntegral` and `PathFactored` are
    its final subclasses.

    Args:
        model: a PEFT model with LoRA, or a bare model for full fine-tuning.
        gradient: "exact" (dL/dU, default) or "effective" (the paper's).
        xi: added to U^2, in squared weight units.
        clamp: "step" clamps credits at zero after every step (the paper), "end" once per epoch.
        names: target weights for full fine-tuning, as in `targets.matching`.
        offload: keep credits and Omega in CPU memory while the model is on a GPU, at the price of
            one transfer of each weight's credits per step.

    In several processes that train one model (DDP) each keeps the credits of some of the weights;
    `finish` brings them together, in every process.

    Raises ValueError for models that cannot be recorded (see `targets.target_weights`).
    """

    estimator: str

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient: str = "exact",
        xi: float = 1e-9,
        clamp: str = "step",
        names: str | None = None,
        offload: bool = False,
    ):
        if gradient not in ("exact", "effective"):
            raise OptionError(f"gradient expects 'exact' or 'effective', found '{gradient}'")
        if clamp not in ("step", "end"):
            raise OptionError(f"clamp expects 'step' or 'end', found '{clamp}'")
        if not xi > 0:
            raise OptionError(f"xi must be positive, found {xi}")
        self.weights = target_weights(model, names=names)
        self.gradient, self.xi, self.clamp, self.offload = gradient, xi, clamp, offload
        self._about_base = of_model(model)  # now: training may change it
        self.steps = self.skipped = self.epochs = 0
        self.decrease = 0.0  # nats: sum over steps and elements of -g * d, before clamping
        self._steps_in_epoch = 0
        self._credits = Credits(self.weights, self._zeros)

    def _new(self, weight: TargetWeight, *shape: int) -> Tensor:
        """Zeros where credits are kept, in f32 or wider."""
        first = weight.parameters[0]
        device = torch.device("cpu") if self.offload else first.device
        return torch.zeros(shape, dtype=wider(first.dtype), device=device)

    @abc.abstractmethod
    def _zeros(self, weight: TargetWeight) -> CreditParts:
        """What the credit (and Omega) of one weight is kept in."""

    @abc.abstractmethod
    def gather(
        self, weight: LowRankWeight, before: Gradient | None, x: Tensor, d: Tensor
    ) -> Gradient:
        """`before` (None at first) with dL/dU of one more batch: x (tokens, in) the inputs, d
        (tokens, out) the output gradients, in f32 or wider.
        """

    @abc.abstractmethod
    def from_factors(self, left: Tensor, right: Tensor) -> Gradient:
        """A gradient given as a product, (out, q) @ (q, in)."""

    @abc.abstractmethod
    def _earned_by(
        self, weight: TargetWeight, gradient: Gradient, before: tuple[Tensor, ...]
    ) -> CreditParts:
        """-g * d of one step, in the form of `_zeros`."""

    @abc.abstractmethod
    def _normalised(self, weight: TargetWeight, credit: CreditParts) -> CreditParts:
        """What one epoch adds to Omega, credit / (U^2 + xi), in the form of `_zeros`."""

    @abc.abstractmethod
    def _add(self, omega: CreditParts, more: CreditParts) -> CreditParts:
        """The sum of two epochs' Omega."""

    @abc.abstractmethod
    def _entry(self, omega: CreditParts) -> Entry:
        """The entry of one weight."""

    def attach(self, optimizer: Any, *, scaler: Any = None) -> Attachment:
        """Watch `optimizer` (or accelerate's wrapper of one); returns a handle, also a context
        manager, whose `close()` removes every trace.

        `scaler`: the GradScaler in use, so that scaled gradients are recorded in nats. Do not clip
        before the step with gradient="effective". Raises ValueError for optimizers whose steps
        cannot be seen, OptionError where the paper's gradient is not defined.
        """
        self._credits.divide()  # the processes may have found each other since
        return Attachment(self, optimizer, scaler)

    def end_epoch(self) -> None:
        """Add this epoch's credits to Omega and start new ones; nothing happens in an epoch without
        steps.
        """
        if self._steps_in_epoch == 0:
            return
        kept = self._credits
        for weight in filter(kept.keeps, self.weights):
            credit, omega = kept.credit[weight.name], kept.omega[weight.name]
            more = self._normalised(weight, tuple(part.clamp(min=0) for part in credit))
            kept.omega[weight.name] = self._add(omega, more)
            for part in credit:
                part.zero_()
        self.epochs += 1
        self._steps_in_epoch = 0

    def finish(self) -> Importance:
        """End the last epoch; the importance, with the adapter as it is now as its anchor; of
        several processes, together. Raises ValueError if no step was seen.
        """
        self.end_epoch()
        if self.epochs == 0:
            raise ValueError(
                "no optimizer step was recorded: attach the recorder to the optimizer that "
                "trains these weights, then train"
            )
        omegas = {weight.name: self._credits.omega_everywhere(weight) for weight in self.weights}
        entries = {name: self._entry(omega) for name, omega in omegas.items()}
        about = {**self._estimate(entries).info(), **self._about_base}
        return Importance(entries, _anchors(self.weights), about)

    def _estimate(self, entries: dict[str, Entry]) -> Estimate:
        """What the file says about the importance."""
        device = self.weights[0].parameters[0].device
        [decrease] = distributed.add_up_numbers([self.decrease], device)
        return Estimate(
            estimator=self.estimator,
            unit=UNITS[self.gradient],
            tier=next(iter(entries.values())).tier,
            settings={
                "gradient": self.gradient,
                "xi": self.xi,
                "clamp": self.clamp,
                "steps": self.steps,
                "skipped": self.skipped,
                "epochs": self.epochs,
                "decrease_nats": decrease,
            },
            norms={name: entry.norm() for name, entry in entries.items()},
        )

    def state_dict(self) -> StateDict:
        """Everything needed to go on later: tensors and plain numbers; of several processes, what
        this one keeps.
        """
        numbers = PathNumbers(
            steps=self.steps,
            skipped=self.skipped,
            epochs=self.epochs,
            decrease=self.decrease,
            in_epoch=self._steps_in_epoch,
        )
        kept = self._credits
        return PathState(self.estimator, numbers, kept.credit, kept.omega).plain()

    def load_state_dict(self, plain: StateDict) -> None:
        """Go on from `state_dict()`.

        Raises ValueError if it belongs to other weights or another estimator.
        """
        self._credits.divide()
        state = PathState.of(plain, self.estimator, self._credits.credit)
        self._credits.restore(state.credit, state.omega)
        numbers = state.numbers
        self.steps, self.skipped, self.epochs = numbers.steps, numbers.skipped, numbers.epochs
        self.decrease, self._steps_in_epoch = numbers.decrease, numbers.in_epoch

    def record_step(
        self, before: Mapping[str, tuple[Tensor, ...]], gradients: Mapping[str, Gradient]
    ) -> None:
        """Credit one optimizer step, given the parameters before it and a gradient of U for each
        weight that had one.
        """
        # In several processes one that saw nothing of a weight takes part all the same.
        stepped = [
            weight
            for weight in self.weights
            if weight.name in gradients or (self._credits.owner and weight.name in before)
        ]
        pairs = [
            (p.detach(), old)
            for weight in stepped
            for p, old in zip(weight.parameters, before[weight.name], strict=True)
        ]
        if all(torch.equal(now, old) for now, old in pairs):
            self.skipped += 1  # a GradScaler skipped the step, or the learning rate was zero
            return
        self._check_step(pairs, gradients)
        for weight in stepped:
            earned = self._earned(weight, gradients.get(weight.name), before[weight.name])
            if earned is None:
                continue
            self.decrease += float(earned[0].sum())
            self._credits.add(weight, earned, clamp=self.clamp == "step")
        self.steps += 1
        self._steps_in_epoch += 1

    def _check_step(
        self, pairs: list[tuple[Tensor, Tensor]], gradients: Mapping[str, Gradient]
    ) -> None:
        """Raise ValueError where a step is not finite, or where the processes train different
        models. `pairs`: each parameter now and before the step.
        """
        finite = all(bool(torch.isfinite(now).all()) for now, _ in pairs)
        if not finite or not all(map(is_finite, gradients.values())):
            raise ValueError(
                f"non-finite gradient or weight at recorded step {self.steps + 1}; lower the "
                "learning rate or record in f32"
            )
        if self._credits.owner and self.steps == 0:
            moved = sum(float((now.double() - old.double()).abs().sum()) for now, old in pairs)
            distributed.check_same(
                "the first recorded step",
                moved,
                "recording in several processes wants them to train one model (DDP)",
            )

    def _earned(
        self, weight: TargetWeight, gradient: Gradient | None, before: tuple[Tensor, ...]
    ) -> CreditParts | None:
        """-g * d of one step, in several processes only at the weight's owner, with g their mean.

        The movement is the same everywhere, and parameter gradients are once they have been
        averaged. The exact gradient under LoRA is not: it is what this process's backward pass saw.
        Its credit, which is linear in it, is averaged: row and column sums for path-factored, else
        (out, in).
        """
        owner = self._credits.owner
        local = owner and self.gradient == "exact" and isinstance(weight, LowRankWeight)
        if not self._credits.keeps(weight) and not local:
            return None
        if gradient is not None:
            earned = self._earned_by(weight, gradient, before)
        else:
            device = weight.parameters[0].device
            earned = tuple(part.to(device) for part in self._zeros(weight))
        if local:
            earned = tuple(part.div(distributed.world_size()).contiguous() for part in earned)
            for part in earned:
                distributed.add_up_at(part, owner[weight.name])
        return earned if self._credits.keeps(weight) else None


def _anchors(weights: list[TargetWeight]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, scale * B) of every LoRA weight as it is now; full weights and adapters that started away
    from the base have none.
    """
    return {
        w.name: (w.A.detach().float().clone(), (w.B.detach().float() * w.scale))
        for w in weights
        if isinstance(w, LowRankWeight) and w.initial is None
    }
