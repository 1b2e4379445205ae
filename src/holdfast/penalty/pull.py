"""Penalty: holds the weights of a model where importance says so, by a pull added to the gradients right before each optimizer step.

    penalty = holdfast.Penalty(peft_model, importance, strength=1.0)
    with penalty.attach(optimizer):
        ...any training loop...

The pull comes after clipping, once per optimizer step, whatever the gradient accumulation. Strength 0 changes nothing, bit for bit, and allocates nothing.
Song et al. 2025, arXiv 2501.13669; what we do differently: no graph, no dense copy, norms of importance computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.config import OptionError, nearest
from holdfast.importance.container import CodedEntry, Importance
from holdfast.layers import Uniform
from holdfast.penalty import fused, tiled
from holdfast.stepping import before_step, pending_scale, unwrapped_optimizer, will_skip
from holdfast.weights import FullWeight, TargetWeight, base_shapes, fingerprint, target_weights, wider


class Penalty:
    """The penalty of one model.

    Args:
        model: a PEFT model with LoRA (rank, alpha and targets may differ from recording), or a bare model for full fine-tuning.
        importance: covers every target weight; a file with more weights than the model adapts is fine.
        strength: lambda; multiplies the energy.
        layers: layer coefficients (`holdfast.layers`); default Uniform().
        anchor: "base" holds towards U = 0, "recorded" towards the adapter stored in the file.
        names: target weights for full fine-tuning.
        implementation: "tiled" (any device) or "fused", the Triton kernel for LoRA on a GPU: checked in Triton's interpreter only, so not yet the default.

    Raises ValueError when importance does not fit the model, OptionError for wrong settings.
    """

    def __init__(self, model: nn.Module, importance: Importance, *, strength: float, layers: Any = None, anchor: str = "base", names: str | None = None,
                 implementation: str = "tiled"):  # fmt: skip
        if implementation not in ("tiled", "fused"):
            raise OptionError(f"unknown implementation '{implementation}'; {nearest(implementation, ('tiled', 'fused'))}")
        if not (math.isfinite(strength) and strength >= 0):
            raise OptionError(f"strength must be finite and not negative, found {strength}")
        if anchor not in ("base", "recorded"):
            raise OptionError(f"unknown anchor '{anchor}'; {nearest(anchor, ('base', 'recorded'))}")
        self.importance, self.strength, self.anchor = importance, float(strength), anchor
        self.weights = target_weights(model, names=names)
        check_fit(model, importance, [weight.name for weight in self.weights], anchor)
        self.implementation = implementation
        if implementation == "fused":
            for device in {weight.parameters[0].device for weight in self.weights}:
                ok, why = fused.available(device)
                if not ok:
                    raise OptionError(f"implementation 'fused' cannot be used: {why}; use 'tiled'")
        self.coefficients: dict[str, float] = (layers or Uniform()).coefficients(importance.norms(), self.weights)
        self.pull_norm: float | None = None  # of the last pull over all factors, before it was added
        self.gradient_norm: float | None = None  # of the gradient it was added to
        self._last_energy: float | None = None

    def attach(self, optimizer: Any) -> PenaltyAttachment:
        """Pull before every step of `optimizer`; returns a handle, also a context manager, whose `close()` removes the hook."""
        return PenaltyAttachment(self, optimizer)

    @torch.no_grad()
    def pull(self, *, scale: float = 1.0) -> None:
        """Add the pull to `.grad` now. `scale` multiplies it where gradients still carry a GradScaler's factor."""
        if self.strength == 0:
            return
        energy, pulled, gradient = [], [], []
        for weight in self.weights:
            c = self.coefficients[weight.name]
            parts, e = self._pull_of(weight, self.strength * c)
            energy.append(c * e)
            for parameter, part in zip(weight.parameters, parts, strict=True):
                if not parameter.requires_grad:
                    continue
                pulled.append(part.square().sum())
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradient.append(parameter.grad.to(part.dtype).square().sum() / scale**2)
                parameter.grad.add_(part, alpha=scale)
        self._last_energy = float(_total(energy))
        self.pull_norm, self.gradient_norm = math.sqrt(float(_total(pulled))), math.sqrt(float(_total(gradient)))

    @torch.no_grad()
    def energy(self) -> float:
        """sum_l c_l * energy_l at the weights as they are now, in nats for importance in nats per squared weight."""
        return float(_total([self.coefficients[w.name] * self._pull_of(w, 0.0)[1] for w in self.weights]))

    def value(self) -> float:
        """strength * energy(): what the paper adds to the loss."""
        return self.strength * self.energy()

    def logs(self) -> dict[str, float]:
        """Energy, pull norm and pull/gradient ratio of the last step, for a training log; empty before the first."""
        if self._last_energy is None or self.pull_norm is None or self.gradient_norm is None:
            return {}
        ratio = self.pull_norm / self.gradient_norm if self.gradient_norm > 0 else 0.0
        return {"energy": self._last_energy, "pull_norm": self.pull_norm, "pull_ratio": ratio}

    def _pull_of(self, weight: TargetWeight, k: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """(pull per parameter, energy without coefficient) of one weight, in f32 or wider."""
        dtype, device = wider(weight.parameters[0].dtype), weight.parameters[0].device
        entry = self.importance[weight.name].to(device)
        anchor = self._anchor_of(weight, device, dtype)
        if isinstance(weight, FullWeight):
            part = torch.empty(weight.shape, dtype=dtype, device=device)
            energy = tiled.full_pull(lambda rows: _movement(weight, rows, anchor), entry.rows, part, k)
            return (weight.oriented(part),), energy
        A, B = weight.A.detach(), weight.B.detach()
        if self.implementation == "fused":
            values, scale = (entry.codes, entry.scale) if isinstance(entry, CodedEntry) else (entry.values, None)
            pull_A, pull_B, energy = fused.pull(A, B, weight.scale, values, scale, entry.tier, anchor, k)
            return (pull_A, pull_B), energy
        pull_A, pull_B, energy = tiled.pull(A.to(dtype), B.to(dtype), weight.scale, entry.rows, anchor, k)
        return (pull_A, pull_B), energy

    def _anchor_of(self, weight: TargetWeight, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """(A0, B0) with B0 @ A0 what U = scale * B @ A is held towards: the recorded adapter, and where the adapter started, side by side."""
        pairs = [self.importance.anchors[weight.name]] if self.anchor == "recorded" else []
        if not isinstance(weight, FullWeight) and weight.initial is not None:
            pairs.append((weight.initial[0], weight.initial[1] * weight.scale))
        if not pairs:
            return None
        return torch.cat([A.to(device, dtype) for A, _ in pairs]), torch.cat([B.to(device, dtype) for _, B in pairs], 1)


def _movement(weight: FullWeight, rows: slice, anchor: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows of W - W(base) - U*, (rows, in), in f32 or wider."""
    dtype = wider(weight.W.dtype)
    D = weight.oriented(weight.W.detach())[rows].to(dtype) - weight.oriented(weight.base)[rows].to(weight.W.device, dtype)
    return D if anchor is None else D.addmm_(anchor[1][rows], anchor[0], alpha=-1)


class PenaltyAttachment:
    """The penalty's hook on one optimizer; `close()` or leaving the `with` block removes it."""

    def __init__(self, penalty: Penalty, optimizer: Any):
        self.penalty = penalty
        self.optimizer = unwrapped_optimizer(optimizer)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for weight in penalty.weights:
            if any(p.requires_grad and id(p) not in known for p in weight.parameters):
                raise ValueError(f"'{weight.name}' is not among this optimizer's parameters; attach the penalty to the optimizer that trains it")
        self._handle: Any = before_step(self.optimizer, self._pull)

    def __enter__(self) -> Penalty:
        return self.penalty

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _pull(self) -> None:
        """The pull, unless a GradScaler is about to skip the step; scaled where a fused optimizer has yet to unscale the gradients."""
        if not will_skip(self.optimizer):
            self.penalty.pull(scale=pending_scale(self.optimizer))


def _total(parts: list[Any]) -> Any:
    """Sum of scalars that may live on several devices."""
    return sum(float(part) for part in parts)


def check_fit(model: nn.Module, importance: Importance, targets: Sequence[str], anchor: str) -> None:
    """Raise ValueError unless `importance` was recorded on this base model and covers every target weight (and has its anchors where needed)."""
    source = importance.info.get("path", "the importance")
    shapes = base_shapes(model)
    wrong = [name for name in importance if name in shapes and importance[name].shape != shapes[name]]
    recorded_on = importance.info.get("model", {}).get("name")
    advice = f"It was recorded on {recorded_on}; record again on this model." if recorded_on else "Record again on this model."
    if wrong:
        first, more = wrong[0], f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{source} does not fit the model: '{first}' is {importance[first].shape} in the file and {shapes[first]} in the model{more}. {advice}"
        )
    missing = [name for name in targets if name not in importance]
    if missing:
        raise ValueError(f"{source} does not cover {len(missing)} of {len(targets)} target weights, first '{missing[0]}'; "
                         f"it holds {len(importance)} weights. Record with these targets, or tune fewer. {advice}")  # fmt: skip
    expected, found = importance.info.get("model", {}).get("fingerprint"), fingerprint(model)
    if expected and expected != found:
        raise ValueError(f"{source} was recorded on another base model: fingerprint {expected[:12]} in the file, {found[:12]} here. {advice}")
    if anchor == "recorded":
        bare = [name for name in targets if name not in importance.anchors]
        if bare:
            raise ValueError(f"{source} has no recorded adapter for '{bare[0]}'; use anchor 'base', or record with --keep-anchor")
