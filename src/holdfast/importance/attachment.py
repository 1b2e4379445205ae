"""Watching an optimizer: what path estimators share. Subclasses say what one step is worth and what remains of it.

Around every optimizer step an `Attachment` hands the recorder the parameters before it and a gradient of each weight's effective update U:

    exact       dL/dU = (output gradients)^T @ (inputs), from the backward pass: neither clipped nor divided by anything; .grad for full fine-tuning
    effective   s (B gA + gB A - eta gB gA), from the factors' gradients (Song et al. 2025, arXiv 2501.13669)

The hooks are removed by `close()`, or on leaving the `with` block, whatever happened in it.
"""

from __future__ import annotations

import abc
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import distributed
from holdfast.importance.container import Entry, Importance
from holdfast.importance.movement import effective_gradient
from holdfast.options import OptionError
from holdfast.stepping import before_step, pending_scale, unwrapped_optimizer, will_skip
from holdfast.weights import FullWeight, LowRankWeight, TargetWeight, target_weights, wider

Sums = dict[str, tuple[Tensor, ...]]


class PathRecorder(abc.ABC):
    """A recorder of credits along the path of an optimizer; `PathIntegral` and `PathFactored` are its final subclasses.

    Args:
        model: a PEFT model with LoRA, or a bare model for full fine-tuning.
        gradient: "exact" (dL/dU, default) or "effective" (the paper's).
        xi: added to U^2, in squared weight units.
        clamp: "step" clamps credits at zero after every step (the paper), "end" once per epoch.
        names: target weights for full fine-tuning, as in `weights.matching`.
        offload: keep credits and Omega in CPU memory while the model is on a GPU, at the price of one transfer of each weight's credits per step.

    In several processes that train one model (DDP) each keeps the credits of its share of the weights; `finish` brings them together, in every process.

    Raises ValueError for models that cannot be recorded (see `weights.target_weights`).
    """

    estimator: str

    def __init__(self, model: nn.Module, *, gradient: str = "exact", xi: float = 1e-9, clamp: str = "step", names: str | None = None,
                 offload: bool = False):  # fmt: skip
        if gradient not in ("exact", "effective"):
            raise OptionError(f"gradient expects 'exact' or 'effective', found '{gradient}'")
        if clamp not in ("step", "end"):
            raise OptionError(f"clamp expects 'step' or 'end', found '{clamp}'")
        if not xi > 0:
            raise OptionError(f"xi must be positive, found {xi}")
        self.weights = target_weights(model, names=names)
        self.gradient, self.xi, self.clamp, self.offload = gradient, xi, clamp, offload
        self.steps = self.skipped = self.epochs = 0
        self.decrease = 0.0  # nats: sum over steps and elements of -g * d, before clamping
        self._steps_in_epoch = 0
        self._owner: dict[str, int] = {}  # weight -> process, once there are several
        self._credit: Sums = {}
        self._omega: Sums = {}
        self._divide()

    def _divide(self) -> None:
        """Credits of each weight are kept by one process; what would be another's is dropped."""
        if distributed.running() and not self._owner:
            self._owner = distributed.owners({weight.name: (weight.name, math.prod(weight.shape)) for weight in self.weights})
        kept = [weight for weight in self.weights if self._keeps(weight)]
        self._credit = {weight.name: self._credit.get(weight.name) or self._zeros(weight) for weight in kept}
        self._omega = {weight.name: self._omega.get(weight.name) or self._zeros(weight) for weight in kept}

    def _keeps(self, weight: TargetWeight) -> bool:
        return self._owner.get(weight.name, 0) == distributed.rank()

    def _new(self, weight: TargetWeight, *shape: int) -> Tensor:
        """Zeros where credits are kept, in f32 or wider."""
        first = weight.parameters[0]
        return torch.zeros(shape, dtype=wider(first.dtype), device="cpu" if self.offload else first.device)

    @abc.abstractmethod
    def _zeros(self, weight: TargetWeight) -> tuple[Tensor, ...]:
        """What the credit (and Omega) of one weight is kept in."""

    @abc.abstractmethod
    def gather(self, weight: LowRankWeight, before: Any, x: Tensor, d: Tensor) -> Any:
        """`before` (None at first) with dL/dU of one more batch: x (tokens, in) the inputs, d (tokens, out) the output gradients, in f32 or wider."""

    @abc.abstractmethod
    def from_factors(self, left: Tensor, right: Tensor) -> Any:
        """A gradient given as a product, (out, q) @ (q, in)."""

    @abc.abstractmethod
    def _shares(self, weight: TargetWeight, gradient: Any, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """-g * d of one step, in the form of `_zeros`."""

    @abc.abstractmethod
    def _normalised(self, weight: TargetWeight, credit: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One epoch's share of Omega, credit / (U^2 + xi), in the form of `_zeros`."""

    @abc.abstractmethod
    def _add(self, omega: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The sum of two epochs' Omega."""

    @abc.abstractmethod
    def _entry(self, omega: tuple[Tensor, ...]) -> Entry:
        """The entry of one weight."""

    def attach(self, optimizer: Any, *, scaler: Any = None) -> Attachment:
        """Watch `optimizer` (or accelerate's wrapper of one); returns a handle, also a context manager, whose `close()` removes every trace.

        `scaler`: the GradScaler in use, so that scaled gradients are recorded in nats. Do not clip before the step with gradient="effective".
        Raises ValueError for optimizers whose steps cannot be seen, OptionError where the paper's gradient is not defined.
        """
        self._divide()  # the processes may have found each other since
        return Attachment(self, optimizer, scaler)

    def end_epoch(self) -> None:
        """Add this epoch's credits to Omega and start new ones; nothing happens in an epoch without steps."""
        if self._steps_in_epoch == 0:
            return
        for weight in self.weights:
            if not self._keeps(weight):
                continue
            credit = self._credit[weight.name]
            self._omega[weight.name] = self._add(self._omega[weight.name], self._normalised(weight, tuple(part.clamp(min=0) for part in credit)))
            for part in credit:
                part.zero_()
        self.epochs += 1
        self._steps_in_epoch = 0

    def finish(self) -> Importance:
        """End the last epoch; the importance, with the adapter as it is now as its anchor; of several processes, together. Raises ValueError if no step
        was seen."""
        self.end_epoch()
        if self.epochs == 0:
            raise ValueError("no optimizer step was recorded: attach the recorder to the optimizer that trains these weights, then train")
        entries = {weight.name: self._entry(self._whole(weight)) for weight in self.weights}
        [decrease] = distributed.add_up_numbers([self.decrease], self.weights[0].parameters[0].device)
        info = {
            "estimator": self.estimator,
            "tier": next(iter(entries.values())).tier,
            "unit": "nats per squared weight" if self.gradient == "exact" else "arbitrary (effective gradient)",
            "settings": {"gradient": self.gradient, "xi": self.xi, "clamp": self.clamp, "steps": self.steps, "skipped": self.skipped,
                         "epochs": self.epochs, "decrease_nats": decrease},
            "norms": {name: entry.norm() for name, entry in entries.items()},
        }  # fmt: skip
        return Importance(entries, _anchors(self.weights), info)

    def _whole(self, weight: TargetWeight) -> tuple[Tensor, ...]:
        """Omega of one weight, in several processes as its owner has it."""
        omega = self._omega[weight.name] if self._keeps(weight) else self._zeros(weight)
        return tuple(distributed.from_owner(part, self._owner.get(weight.name, 0)) for part in omega)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: tensors and plain numbers; of several processes, what this one keeps."""
        numbers = {"steps": self.steps, "skipped": self.skipped, "epochs": self.epochs, "decrease": self.decrease, "in_epoch": self._steps_in_epoch}
        return {"estimator": self.estimator, "numbers": numbers, "credit": self._credit, "omega": self._omega}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises ValueError if it belongs to other weights or another estimator."""
        self._divide()
        if state["estimator"] != self.estimator or set(state["credit"]) != set(self._credit):
            raise ValueError("the saved recorder state is for other target weights or another estimator; start again without --resume")
        for mine, theirs in ((self._credit, state["credit"]), (self._omega, state["omega"])):
            for name, parts in theirs.items():
                mine[name] = tuple(part.to(old.device).clone() for part, old in zip(parts, mine[name], strict=True))
        numbers = state["numbers"]
        self.steps, self.skipped, self.epochs = numbers["steps"], numbers["skipped"], numbers["epochs"]
        self.decrease, self._steps_in_epoch = numbers["decrease"], numbers["in_epoch"]

    def record_step(self, before: dict[str, tuple[Tensor, ...]], gradients: dict[str, Any]) -> None:
        """Credit one optimizer step, given the parameters before it and a gradient of U for each weight that had one."""
        # In several processes one that saw nothing of a weight takes part all the same.
        stepped = [weight for weight in self.weights if weight.name in gradients or (self._owner and weight.name in before)]
        pairs = [(p.detach(), old) for weight in stepped for p, old in zip(weight.parameters, before[weight.name], strict=True)]
        if all(torch.equal(now, old) for now, old in pairs):
            self.skipped += 1  # a GradScaler skipped the step, or the learning rate was zero
            return
        if not all(bool(torch.isfinite(now).all()) for now, _ in pairs) or not all(_finite(gradient) for gradient in gradients.values()):
            raise ValueError(f"non-finite gradient or weight at recorded step {self.steps + 1}; lower the learning rate or record in f32")
        if self._owner and self.steps == 0:
            moved = sum(float((now.double() - old.double()).abs().sum()) for now, old in pairs)
            distributed.check_same("the first recorded step", moved, "recording in several processes wants them to train one model (DDP)")
        for weight in stepped:
            shares = self._shared(weight, gradients.get(weight.name), before[weight.name])
            if shares is None:
                continue
            self.decrease += float(shares[0].sum())
            for credit, share in zip(self._credit[weight.name], shares, strict=True):
                credit.add_(share.to(credit.device))
                if self.clamp == "step":
                    credit.clamp_(min=0)
        self.steps += 1
        self._steps_in_epoch += 1

    def _shared(self, weight: TargetWeight, gradient: Any, before: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """-g * d of one step, in several processes only at the weight's owner, with g their mean.

        The movement is the same everywhere, and parameter gradients are once they have been averaged. The exact gradient under LoRA is not: it is what this
        process's backward pass saw. Its credit, which is linear in it, is averaged: row and column sums for path-factored, else (out, in).
        """
        local = self._owner and self.gradient == "exact" and isinstance(weight, LowRankWeight)
        if not self._keeps(weight) and not local:
            return None
        device = weight.parameters[0].device
        shares = self._shares(weight, gradient, before) if gradient is not None else tuple(part.to(device) for part in self._zeros(weight))
        if local:
            shares = tuple(share.div(distributed.size()).contiguous() for share in shares)
            for share in shares:
                distributed.add_up_at(share, self._owner[weight.name])
        return shares if self._keeps(weight) else None


class Attachment:
    """Hooks of one recorder on one optimizer; `close()` or leaving the `with` block removes all of them."""

    def __init__(self, recorder: PathRecorder, optimizer: Any, scaler: Any):
        self.recorder, self.scaler = recorder, scaler
        self.optimizer = unwrapped_optimizer(optimizer)
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._pending: dict[str, Any] = {}
        self._gradients: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._rates = _check_optimizer(recorder, self.optimizer)
        # First of all pre-hooks: the recorder sees the gradient before any pull.
        self._handles.append(before_step(self.optimizer, self._snapshot, first=True, closure_once=True))
        self._handles.append(self.optimizer.register_step_post_hook(self._post))
        if recorder.gradient == "exact":
            for weight in recorder.weights:
                if isinstance(weight, LowRankWeight):
                    self._handles.append(weight.module.register_forward_hook(self._watch(weight)))

    def __enter__(self) -> PathRecorder:
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
        """A forward hook that adds (output gradient)^T @ input = dL/dU to the pending gradient in the backward pass."""
        mine = weakref.ref(self)

        def forward(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            attachment = mine()
            # Here, not in the backward pass: a module may be called several times before it. Checkpointing calls it again within one: that begins nothing.
            if attachment is not None and torch._C._current_graph_task_id() == -1 and _fresh(weight):
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
        if self.recorder.gradient == "effective":
            self._gradients = {w.name: g for w in weights if (g := self._from_factors(w)) is not None}
        else:
            self._gradients = {w.name: g for w in weights if (g := self._exact(w)) is not None}
            if not self._gradients and self.recorder.steps == self.recorder.skipped == 0 and not distributed.running():
                _check_unseen(weights)
        self._pending = {}

    def _exact(self, weight: TargetWeight) -> Any:
        """dL/dU in nats. Backward hooks see gradients as scaled by the GradScaler; parameter gradients may have been unscaled since."""
        if isinstance(weight, LowRankWeight):
            g = self._pending.get(weight.name)
            return None if g is None else _divided(g, self._scale())
        return None if weight.W.grad is None else weight.oriented(weight.W.grad) / pending_scale(self.optimizer)

    def _from_factors(self, weight: TargetWeight) -> Any:
        assert isinstance(weight, LowRankWeight)
        if weight.A.grad is None and weight.B.grad is None:
            return None
        dtype = wider(weight.A.dtype)
        A, B = weight.A.detach().to(dtype), weight.B.detach().to(dtype)
        gA = torch.zeros_like(A) if weight.A.grad is None else weight.A.grad.to(dtype) / pending_scale(self.optimizer)
        gB = torch.zeros_like(B) if weight.B.grad is None else weight.B.grad.to(dtype) / pending_scale(self.optimizer)
        return self.recorder.from_factors(*effective_gradient(A, B, gA, gB, weight.scale, float(self._rates[weight.name]["lr"])))

    def _scale(self) -> float:
        return float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else pending_scale(self.optimizer)

    def _post(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if will_skip(self.optimizer):
            self.recorder.skipped += 1
        elif self._before:
            self.recorder.record_step(self._before, self._gradients)
        self._before, self._gradients = {}, {}


def _fresh(weight: LowRankWeight) -> bool:
    """Whether a new accumulation begins: gradients were cleared since the last step (a GradScaler that skips a step leaves no other sign)."""
    return all(p.grad is None or not bool(p.grad.any()) for p in weight.parameters if p.requires_grad)


def _check_unseen(weights: list[TargetWeight]) -> None:
    """Raise ValueError where the first step has gradients that no hook has seen: torch.compile leaves out hooks that come after its first call."""
    if any(p.grad is not None and bool(p.grad.any()) for weight in weights for p in weight.parameters):
        raise ValueError("the backward pass did not reach the recorder; attach it before the first forward pass (a model compiled by torch.compile keeps the "
                         "hooks it has by then), or use gradient='effective'")  # fmt: skip


def _finite(gradient: Any) -> bool:
    parts = [gradient] if isinstance(gradient, Tensor) else [part for pair in gradient for part in pair]
    return all(bool(torch.isfinite(part).all()) for part in parts)


def _divided(gradient: Any, scale: float) -> Any:
    if scale == 1.0:
        return gradient
    return gradient / scale if isinstance(gradient, Tensor) else [(left / scale, right) for left, right in gradient]


def _check_optimizer(recorder: PathRecorder, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The parameter group of each weight (read anew in every step: schedulers change its lr). Raises for what cannot be recorded."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = {}
    for weight in recorder.weights:
        if any(distributed.is_sharded(p) for p in weight.parameters):
            raise ValueError(f"'{weight.name}' is sharded by FSDP2, where no process sees all of its movement or gradient; record in one process "
                             "or with DDP, or by an estimator that observes the bare model (fisher, kronecker)")  # fmt: skip
        trained = [p for p in weight.parameters if p.requires_grad]
        if not trained:
            raise ValueError(f"'{weight.name}' is frozen, so nothing would move; unfreeze the adapter (for PEFT: is_trainable=True)")
        if any(id(p) not in groups for p in trained):
            raise ValueError(f"'{weight.name}' is not among this optimizer's parameters; attach the recorder to the optimizer that trains it")
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in trained):
            raise ValueError(
                f"'{weight.name}' has a hook that runs inside the backward pass, as optimizers that step there have; use one that steps afterwards"
            )
        if recorder.gradient == "effective":
            if isinstance(weight, FullWeight):
                raise OptionError("gradient='effective' is defined for LoRA factors only; use gradient='exact' for full fine-tuning")
            if len({float(groups[id(p)]["lr"]) for p in trained}) > 1:
                raise OptionError(f"'{weight.name}' has different learning rates for A and B; the paper's effective gradient needs one: use gradient='exact'")
        rates[weight.name] = groups[id(trained[0])]
    return rates


def _anchors(weights: list[TargetWeight]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, scale * B) of every LoRA weight as it is now; full weights and adapters that started away from the base have none."""
    return {w.name: (w.A.detach().float().clone(), (w.B.detach().float() * w.scale)) for w in weights if isinstance(w, LowRankWeight) and w.initial is None}
