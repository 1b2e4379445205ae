"""Path-integral importance (Synaptic Intelligence on the effective update; Song et al. 2025, arXiv 2501.13669, equations in docs/).

At every optimizer step, with g a gradient of the effective update U and d the movement that the optimizer made,

    w <- max(0, w - g * d)                          credit of each element
    Omega = sum over epochs of w / (U^2 + xi)       U at the end of the epoch, w starts at 0 in each

`gradient="exact"` takes g = dL/dU from layer inputs and output gradients; then the sum of -g*d is the loss decrease, in nats, and Omega is in nats per
squared weight. It is what the backward pass saw: neither clipping nor the number of accumulated batches changes it. `gradient="effective"` is the paper's
g = s (B gA + gB A - eta gB gA), built from the factors' gradients: arbitrary units, and wrong if those gradients were clipped first.

Cost while recording: two f32 tensors per target weight (credit, Omega), one more with the exact gradient, plus one (out, in) product per layer and batch.

    recorder = PathIntegral(peft_model)
    with recorder.attach(optimizer):
        ...train...
        recorder.end_epoch()
    importance = recorder.finish()
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.config import OptionError
from holdfast.importance.container import DenseEntry, Entry, Importance
from holdfast.stepping import before_step, pending_scale, unwrapped_optimizer, will_skip
from holdfast.weights import FullWeight, LowRankWeight, TargetWeight, target_weights, wider


def effective_gradient(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scale: float, eta: float) -> Tensor:
    """The direction that one SGD step of the factors moves U: s (B gA + gB A - eta gB gA), (out, in). A, gA (r, in); B, gB (out, r)."""
    return scale * (B @ gA + gB @ (A - eta * gA))


def low_rank_movement(A: Tensor, B: Tensor, A_after: Tensor, B_after: Tensor, scale: float) -> Tensor:
    """U(after) - U(before) = s (dB A_after + B dA), (out, in); never the difference of two products, which would cancel."""
    return scale * ((B_after - B) @ A_after + B @ (A_after - A))


def credit(w: Tensor, g: Tensor, d: Tensor, *, clamp: bool) -> None:
    """In place w <- w - g * d, clamped at zero where asked. All (out, in)."""
    w.addcmul_(g, d, value=-1)
    if clamp:
        w.clamp_(min=0)


def normalise(w: Tensor, U: Tensor, xi: float) -> Tensor:
    """One epoch's share of Omega: max(0, w) / (U^2 + xi), (out, in)."""
    return w.clamp(min=0) / (U * U + xi)


class PathIntegral:
    """Recorder of path-integral importance on any torch optimizer.

    Args:
        model: a PEFT model with LoRA, or a bare model for full fine-tuning.
        gradient: "exact" (dL/dU, default) or "effective" (the paper's).
        xi: added to U^2, in squared weight units.
        clamp: "step" clamps credits at zero after every step (the paper), "end" once per epoch.
        names: target weights for full fine-tuning, as in `weights.matching`.

    Raises ValueError for models that cannot be recorded (see `weights.target_weights`).
    """

    def __init__(self, model: nn.Module, *, gradient: str = "exact", xi: float = 1e-9, clamp: str = "step", names: str | None = None):
        if gradient not in ("exact", "effective"):
            raise OptionError(f"gradient expects 'exact' or 'effective', found '{gradient}'")
        if clamp not in ("step", "end"):
            raise OptionError(f"clamp expects 'step' or 'end', found '{clamp}'")
        if not xi > 0:
            raise OptionError(f"xi must be positive, found {xi}")
        self.weights = target_weights(model, names=names)
        self.gradient, self.xi, self.clamp = gradient, xi, clamp
        self.steps = self.skipped = self.epochs = 0
        self.decrease = 0.0  # nats: sum over steps and elements of -g * d, before clamping
        self._credit = {w.name: torch.zeros(w.shape, dtype=wider(w.parameters[0].dtype), device=w.parameters[0].device) for w in self.weights}
        self._omega = {name: torch.zeros_like(w) for name, w in self._credit.items()}
        self._steps_in_epoch = 0

    def attach(self, optimizer: Any, *, scaler: Any = None) -> Attachment:
        """Watch `optimizer` (or accelerate's wrapper of one); returns a handle, also a context manager, whose `close()` removes every trace.

        `scaler`: the GradScaler in use, so that scaled gradients are recorded in nats. Do not clip before the step with gradient="effective".
        Raises ValueError for optimizers whose steps cannot be seen, OptionError where the paper's gradient is not defined.
        """
        return Attachment(self, optimizer, scaler)

    def end_epoch(self) -> None:
        """Add this epoch's credits to Omega and start new ones; nothing happens in an epoch without steps."""
        if self._steps_in_epoch == 0:
            return
        for weight in self.weights:
            w = self._credit[weight.name]
            self._omega[weight.name] += normalise(w, weight.update().to(w), self.xi)
            w.zero_()
        self.epochs += 1
        self._steps_in_epoch = 0

    def finish(self) -> Importance:
        """End the last epoch; the importance, with the adapter as it is now as its anchor. Raises ValueError if no step was seen."""
        self.end_epoch()
        if self.epochs == 0:
            raise ValueError("no optimizer step was recorded: attach the recorder to the optimizer that trains these weights, then train")
        entries: dict[str, Entry] = {
            name: DenseEntry(omega.to(torch.float32 if omega.dtype != torch.float64 else omega.dtype)) for name, omega in self._omega.items()
        }
        info = {
            "estimator": "path",
            "tier": "f32",
            "unit": "nats per squared weight" if self.gradient == "exact" else "arbitrary (effective gradient)",
            "settings": {"gradient": self.gradient, "xi": self.xi, "clamp": self.clamp, "steps": self.steps, "skipped": self.skipped,
                         "epochs": self.epochs, "decrease_nats": self.decrease},
            "norms": {name: entry.norm() for name, entry in entries.items()},
        }  # fmt: skip
        return Importance(entries, _anchors(self.weights), info)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: tensors and plain numbers."""
        numbers = {"steps": self.steps, "skipped": self.skipped, "epochs": self.epochs, "decrease": self.decrease, "in_epoch": self._steps_in_epoch}
        return {"numbers": numbers, "credit": self._credit, "omega": self._omega}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises ValueError if it belongs to other weights."""
        if set(state["credit"]) != set(self._credit):
            raise ValueError("the saved recorder state is for other target weights; start again without --resume")
        for name in self._credit:
            self._credit[name].copy_(state["credit"][name])
            self._omega[name].copy_(state["omega"][name])
        numbers = state["numbers"]
        self.steps, self.skipped, self.epochs = numbers["steps"], numbers["skipped"], numbers["epochs"]
        self.decrease, self._steps_in_epoch = numbers["decrease"], numbers["in_epoch"]

    def record_step(self, before: dict[str, tuple[Tensor, ...]], gradients: dict[str, Tensor]) -> None:
        """Credit one optimizer step, given the parameters before it and a gradient of U for each weight that had one."""
        finite = all(bool(torch.isfinite(g).all()) for g in gradients.values())
        moves = {w.name: _movement(w, before[w.name]) for w in self.weights if w.name in gradients}
        if not any(bool(d.any()) for d in moves.values()):
            self.skipped += 1  # a GradScaler skipped the step, or the learning rate was zero
            return
        if not finite or not all(bool(torch.isfinite(d).all()) for d in moves.values()):
            raise ValueError(f"non-finite gradient or weight at recorded step {self.steps + 1}; lower the learning rate or record in f32")
        for name, d in moves.items():
            g = gradients[name].to(d)
            self.decrease -= float((g * d).sum())
            credit(self._credit[name], g, d, clamp=self.clamp == "step")
        self.steps += 1
        self._steps_in_epoch += 1


class Attachment:
    """Hooks of one recorder on one optimizer; `close()` or leaving the `with` block removes all of them."""

    def __init__(self, recorder: PathIntegral, optimizer: Any, scaler: Any):
        self.recorder, self.scaler = recorder, scaler
        self.optimizer = unwrapped_optimizer(optimizer)
        self._before: dict[str, tuple[Tensor, ...]] = {}
        self._pending: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._rates = _check_optimizer(recorder, self.optimizer)
        # First of all pre-hooks: the recorder sees the gradient before any pull.
        self._handles.append(before_step(self.optimizer, self._snapshot, first=True, closure_once=True))
        self._handles.append(self.optimizer.register_step_post_hook(self._post))
        if recorder.gradient == "exact":
            for weight in recorder.weights:
                if isinstance(weight, LowRankWeight):
                    self._handles.append(weight.module.register_forward_hook(self._watch(weight)))

    def __enter__(self) -> PathIntegral:
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
        product = grad.reshape(-1, weight.shape[0]).to(dtype).T @ x.reshape(-1, weight.shape[1]).to(dtype)  # (out, in)
        if weight.name in self._pending and not _fresh(weight):
            self._pending[weight.name] += product
        else:
            self._pending[weight.name] = product

    def _snapshot(self) -> None:
        """Parameters and gradients right before the optimizer moves them."""
        weights = self.recorder.weights
        self._before = {w.name: tuple(p.detach().clone() for p in w.parameters) for w in weights}
        if self.recorder.gradient == "effective":
            self._gradients = {w.name: g for w in weights if (g := self._from_factors(w)) is not None}
        else:
            self._gradients = {w.name: g for w in weights if (g := self._exact(w)) is not None}
        self._pending = {}

    def _exact(self, weight: TargetWeight) -> Tensor | None:
        """dL/dU in nats. Backward hooks see gradients as scaled by the GradScaler; parameter gradients may have been unscaled since."""
        if isinstance(weight, LowRankWeight):
            g = self._pending.get(weight.name)
            return None if g is None else g / self._scale()
        return None if weight.W.grad is None else weight.oriented(weight.W.grad) / pending_scale(self.optimizer)

    def _from_factors(self, weight: TargetWeight) -> Tensor | None:
        assert isinstance(weight, LowRankWeight)
        if weight.A.grad is None and weight.B.grad is None:
            return None
        dtype = wider(weight.A.dtype)
        A, B = weight.A.detach().to(dtype), weight.B.detach().to(dtype)
        gA = torch.zeros_like(A) if weight.A.grad is None else weight.A.grad.to(dtype) / pending_scale(self.optimizer)
        gB = torch.zeros_like(B) if weight.B.grad is None else weight.B.grad.to(dtype) / pending_scale(self.optimizer)
        return effective_gradient(A, B, gA, gB, weight.scale, float(self._rates[weight.name]["lr"]))

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


def _movement(weight: TargetWeight, before: tuple[Tensor, ...]) -> Tensor:
    """U(after) - U(before), (out, in), in f32 or wider."""
    dtype = wider(weight.parameters[0].dtype)
    now = [p.detach().to(dtype) for p in weight.parameters]
    old = [p.to(dtype) for p in before]
    if isinstance(weight, LowRankWeight):
        return low_rank_movement(old[0], old[1], now[0], now[1], weight.scale)
    return weight.oriented(now[0] - old[0])


def _check_optimizer(recorder: PathIntegral, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The parameter group of each weight (read anew in every step: schedulers change its lr). Raises for what cannot be recorded."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    rates = {}
    for weight in recorder.weights:
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
