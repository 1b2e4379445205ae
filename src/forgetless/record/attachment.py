"""Hooks of a path recorder on an optimizer and on the layers that it trains.

Around every optimizer step an attachment hands the recorder the parameters before the step and a
gradient of each weight's effective update U. The hooks are removed by `close()`, or on leaving the
`with` block, whatever happened in it.

    with Attachment(recorder, optimizer, scaler=None):
        ...train...

It knows of a recorder no more than `Recorder` says, so that recorders can stand on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.model import distributed, shards
from forgetless.model.optimizer_step import (
    ParameterGroup,
    before_step,
    pending_scale,
    unwrapped_optimizer,
    will_skip,
)
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight, wider
from forgetless.record.movement import Gradient, divided_by, effective_gradient


class Recorder(Protocol):
    """What an attachment needs of the recorder that it feeds."""

    weights: list[TargetWeight]
    gradient: str  # "exact" or "effective"
    steps: int  # recorded so far
    skipped: int  # steps that moved nothing

    def gather(
        self, weight: LowRankWeight, before: Gradient | None, x: Tensor, d: Tensor
    ) -> Gradient: ...

    def from_factors(self, left: Tensor, right: Tensor) -> Gradient: ...

    def record_step(
        self, before: Mapping[str, tuple[Tensor, ...]], gradients: Mapping[str, Gradient]
    ) -> None: ...


class Attachment:
    """Hooks of one recorder on one optimizer; `close()` or leaving the `with` block removes all of
    them.
    """

    def __init__(self, recorder: Recorder, optimizer: Any, scaler: Any):
        self.recorder, self.scaler = recorder, scaler
        self.optimizer = unwrapped_optimizer(optimizer)
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._pending: dict[str, Gradient] = {}
        self._gradients: dict[str, Gradient] = {}
        self._handles: list[Any] = []
        self._rates = _check_optimizer(recorder, self.optimizer)
        # First of all pre-hooks: the recorder sees the gradient before any pull.
        self._handles.append(
            before_step(self.optimizer, self._snapshot, first=True, closure_once=True)
        )
        self._handles.append(self.optimizer.register_step_post_hook(self._post))
        if recorder.gradient == "exact":
            for weight in recorder.weights:
                if isinstance(weight, LowRankWeight):
                    self._handles.append(weight.module.register_forward_hook(self._watch(weight)))

    def __enter__(self) -> Recorder:
        return self.recorder

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook; the recorder keeps what it has recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._before.clear()
        self._pending.clear()

    def _watch(self, weight: LowRankWeight) -> Callable[..., None]:
        """A forward hook that adds (output gradient)^T @ input = dL/dU to the pending gradient in
        the backward pass.
        """
        mine = weakref.ref(self)

        def forward(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            attachment = mine()
            # What was pending is dropped here and not in the backward pass, since a module may be
            # called several times before that. Checkpointing calls it again within one, which
            # begins nothing.
            in_backward = torch._C._current_graph_task_id() != -1
            if attachment is not None and not in_backward and _is_fresh(weight):
                attachment._pending.pop(weight.name, None)
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            x = inputs[0].detach()

            def backward(grad: Tensor) -> None:
                attachment = mine()
                if attachment is not None and attachment._handles:
                    attachment._accumulate(weight, x, grad)

            output.register_hook(backward)

        return forward

    def _accumulate(self, weight: LowRankWeight, x: Tensor, grad: Tensor) -> None:
        dtype = wider(weight.A.dtype)
        before = self._pending.get(weight.name)
        x, d = x.reshape(-1, weight.shape[1]).to(dtype), grad.reshape(-1, weight.shape[0]).to(dtype)
        self._pending[weight.name] = self.recorder.gather(weight, before, x, d)

    def _snapshot(self) -> None:
        """Parameters and gradients right before the optimizer moves them."""
        weights = self.recorder.weights
        self._before = {w.name: tuple(p.detach().clone() for p in w.parameters) for w in weights}
        is_exact = self.recorder.gradient == "exact"
        gradient_of = self._exact if is_exact else self._from_factors
        self._gradients = {w.name: g for w in weights if (g := gradient_of(w)) is not None}
        is_first = self.recorder.steps == self.recorder.skipped == 0
        if is_exact and is_first and not self._gradients and not distributed.running():
            _check_unseen(weights)
        self._pending = {}

    def _exact(self, weight: TargetWeight) -> Gradient | None:
        """dL/dU in nats.

        Backward hooks see gradients as scaled by the GradScaler; parameter gradients may have been
        unscaled since.
        """
        if isinstance(weight, LowRankWeight):
            g = self._pending.get(weight.name)
            return None if g is None else divided_by(g, self._scale())
        if weight.W.grad is None:
            return None
        return weight.oriented(weight.W.grad) / pending_scale(self.optimizer)

    def _from_factors(self, weight: TargetWeight) -> Gradient | None:
        assert isinstance(weight, LowRankWeight)
        if weight.A.grad is None and weight.B.grad is None:
            return None
        dtype = wider(weight.A.dtype)
        A, B = weight.A.detach().to(dtype), weight.B.detach().to(dtype)
        gA, gB = self._gradient_of(weight.A, dtype), self._gradient_of(weight.B, dtype)
        eta = float(self._rates[weight.name]["lr"])
        left, right = effective_gradient(A, B, gA, gB, weight.scale, eta)
        return self.recorder.from_factors(left, right)

    def _gradient_of(self, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """A parameter's gradient in nats; zeros where it has none."""
        if parameter.grad is None:
            return torch.zeros_like(parameter, dtype=dtype)
        return parameter.grad.to(dtype) / pending_scale(self.optimizer)

    def _scale(self) -> float:
        """By what backward hooks see gradients multiplied."""
        if self.scaler is not None and self.scaler.is_enabled():
            return float(self.scaler.get_scale())
        return pending_scale(self.optimizer)

    def _post(self, *_: object) -> None:
        if will_skip(self.optimizer):
            self.recorder.skipped += 1
        elif self._before:
            self.recorder.record_step(self._before, self._gradients)
        self._before, self._gradients = {}, {}


def _is_fresh(weight: LowRankWeight) -> bool:
    """Whether a new accumulation begins: gradients were cleared since the last step (a GradScaler
    that skips a step leaves no other sign).
    """
    return all(
        p.grad is None or not bool(p.grad.any()) for p in weight.parameters if p.requires_grad
    )


def _check_unseen(weights: list[TargetWeight]) -> None:
    """Raise ValueError where the first step has gradients that no hook has seen: torch.compile
    leaves out hooks that come after its first call.
    """
    if any(
        p.grad is not None and bool(p.grad.any()) for weight in weights for p in weight.parameters
    ):
        raise ValueError(
            "the backward pass did not reach the recorder; attach it before the first forward "
            "pass (a model compiled by torch.compile keeps the "
            "hooks it has by then), or use gradient='effective'"
        )


def _check_optimizer(
    recorder: Recorder, optimizer: torch.optim.Optimizer
) -> dict[str, ParameterGroup]:
    """The parameter group of each weight (read anew in every step: schedulers change its lr).

    Raises for what cannot be recorded.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = {}
    for weight in recorder.weights:
        trained = [p for p in weight.parameters if p.requires_grad]
        _check_trained(weight, trained, groups)
        if recorder.gradient == "effective":
            _check_effective(weight, {float(groups[id(p)]["lr"]) for p in trained})
        rates[weight.name] = groups[id(trained[0])]
    return rates


def _check_trained(
    weight: TargetWeight, trained: list[nn.Parameter], groups: dict[int, ParameterGroup]
) -> None:
    """Raise ValueError where the optimizer's steps of a weight cannot be seen."""
    if any(shards.is_sharded(p) for p in weight.parameters):
        raise ValueError(
            f"'{weight.name}' is sharded by FSDP2, where no process sees all of its movement "
            "or gradient; record in one process "
            "or with DDP, or by an estimator that observes the bare model (fisher, kronecker)"
        )
    if not trained:
        raise ValueError(
            f"'{weight.name}' is frozen, so nothing would move; unfreeze the adapter (for "
            "PEFT: is_trainable=True)"
        )
    if any(id(p) not in groups for p in trained):
        raise ValueError(
            f"'{weight.name}' is not among this optimizer's parameters; attach the recorder "
            "to the optimizer that trains it"
        )
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in trained):
        raise ValueError(
            f"'{weight.name}' has a hook that runs inside the backward pass, as optimizers "
            "that step there have; use one that steps afterwards"
        )


def _check_effective(weight: TargetWeight, rates: set[float]) -> None:
    """Raise OptionError where the paper's effective gradient is not defined."""
    if isinstance(weight, FullWeight):
        raise OptionError(
            "gradient='effective' is defined for LoRA factors only; use gradient='exact' "
            "for full fine-tuning"
        )
    if len(rates) > 1:
        raise OptionError(
            f"'{weight.name}' has different learning rates for A and B; the paper's "
            "effective gradient needs one: use gradient='exact'"
        )
