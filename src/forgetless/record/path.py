"""Path-integral importance (Synaptic Intelligence on the effective update; Song et al. 2025, arXiv
2501.13669, equations in docs/).

At every optimizer step, with g a gradient of the effective update U and d the movement that the
optimizer made,

    w <- max(0, w - g * d)                          credit of each element
    Omega = sum over epochs of w / (U^2 + xi)       U at the end of the epoch, w starts at 0 in each

`gradient="exact"` takes g = dL/dU from layer inputs and output gradients; then the sum of -g*d is
the loss decrease, in nats, and Omega is in nats per squared weight. It is what the backward pass
saw: neither clipping nor the number of accumulated batches changes it. `gradient="effective"` is
the paper's g = s (B gA + gB A - eta gB gA), built from the factors' gradients: arbitrary units, and
wrong if those gradients were clipped first.

Cost while recording: two f32 tensors per target weight (credit, Omega; in CPU memory with
`offload=True`), one more with the exact gradient, plus one (out, in) product per layer and batch.
`path_factored.py` keeps sums of rows and columns instead.

    recorder = PathIntegral(peft_model)
    with recorder.attach(optimizer):
        ...train...
        recorder.end_epoch()
    importance = recorder.finish()
"""

from __future__ import annotations

from torch import Tensor

from forgetless.importance.entries import DenseEntry, Entry
from forgetless.model.weights import LowRankWeight, TargetWeight
from forgetless.record.movement import Gradient, movement
from forgetless.record.path_recorder import PathRecorder


def normalise(w: Tensor, U: Tensor, xi: float) -> Tensor:
    """What one epoch adds to Omega: max(0, w) / (U^2 + xi), (out, in)."""
    return w.clamp(min=0) / (U * U + xi)


class PathIntegral(PathRecorder):
    """Recorder of path-integral importance on any torch optimizer; see the module, and
    `PathRecorder` for the arguments.
    """

    estimator = "path"

    def _zeros(self, weight: TargetWeight) -> tuple[Tensor, ...]:
        return (self._new(weight, *weight.shape),)

    def gather(
        self, weight: LowRankWeight, before: Gradient | None, x: Tensor, d: Tensor
    ) -> Tensor:
        if before is None:
            return d.T @ x  # (out, in)
        assert isinstance(before, Tensor)
        return before.addmm_(d.T, x)

    def from_factors(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def _earned_by(
        self, weight: TargetWeight, gradient: Gradient, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        assert isinstance(gradient, Tensor)
        move = movement(weight, before)
        d = move[0] @ move[1] if len(move) == 2 else move[0]
        return (-(gradient.to(d) * d),)

    def _normalised(self, weight: TargetWeight, credit: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (normalise(credit[0], weight.update().to(credit[0]), self.xi),)

    def _add(self, omega: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (omega[0].add_(more[0]),)

    def _entry(self, omega: tuple[Tensor, ...]) -> Entry:
        return DenseEntry(omega[0])
