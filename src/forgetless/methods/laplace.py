"""`la-lora`: a Laplace penalty on the factors themselves (arXiv 2512.17720), where everything else
here holds their product.

    penalty = strength * sum over entries of  F_A (A - A0)^2 + F_B (B - B0)^2
    with  F = (1 / scored tokens) * sum over sequences of (gradient of its summed loss)^2

F is the diagonal empirical Fisher of A and of B at the start of tuning, on --replay's text, in the
unit of our `fisher`. A fresh adapter has B = 0, so the gradient of A and with it F_A vanish
exactly: then only B is held, and A turns freely. It costs one backward pass per general sequence
and two tensors per factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from forgetless.data.encoding import Encoded, collate
from forgetless.methods.method import Setup
from forgetless.methods.terms import count_scored, cross_entropy, undisturbed
from forgetless.model.targets import target_weights
from forgetless.model.weights import wider
from forgetless.penalty.attachment import PenaltyAttachment


class FactorPenalty:
    """The penalty on the factors, with what attachments and callbacks use of `Penalty`.

    Raises ValueError where there is no LoRA.
    """

    def __init__(self, model: nn.Module, text: list[Encoded], *, strength: float, pad_id: int = 0):
        self.weights = target_weights(model)
        self.strength = strength
        factors = [p for weight in self.weights for p in weight.parameters if p.requires_grad]
        starts = [p.detach().clone() for p in factors]
        fisher = curvature(model, factors, text, pad_id)
        self._factors = list(zip(factors, starts, fisher, strict=True))
        self._logs: dict[str, float] = {}

    def attach(self, optimizer: object) -> PenaltyAttachment[FactorPenalty]:
        """Pull before every step of `optimizer`."""
        return PenaltyAttachment(self, optimizer)

    @torch.no_grad()
    def pull(self, *, scale: float = 1.0) -> None:
        """Add the gradient of the penalty to `.grad`.

        `scale` multiplies it where gradients still carry a GradScaler's factor. Raises ValueError
        where the pull is not finite.
        """
        energy = pulled = gradient = 0.0  # the last two are squared norms
        for p, start, F in self._factors:
            moved = p.to(F.dtype) - start.to(F.dtype)
            pull = 2 * self.strength * F * moved
            energy += float((F * moved.square()).sum())
            pulled += float(pull.square().sum())
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradient += float(p.grad.to(F.dtype).square().sum()) / scale**2
            p.grad.add_(pull, alpha=scale)
        ratio = math.sqrt(pulled / gradient) if gradient > 0 else 0.0
        self._logs = {"energy": energy, "pull_norm": math.sqrt(pulled), "pull_ratio": ratio}
        if not math.isfinite(pulled):
            raise ValueError(
                f"the pull is {math.sqrt(pulled)} (energy {energy}); lower the strength or the "
                "learning rate"
            )

    def logs(self) -> dict[str, float]:
        """Energy, pull norm and pull/gradient ratio of the last step; empty before the first."""
        return self._logs


def curvature(
    model: nn.Module, factors: list[nn.Parameter], text: list[Encoded], pad_id: int
) -> list[Tensor]:
    """The diagonal empirical Fisher of each factor on `text`, shaped like the factor.

    In f32 or wider; its unit is nats per token and squared unit of the factor.
    """
    sums = [torch.zeros_like(p, dtype=wider(p.dtype)) for p in factors]
    with undisturbed(model):
        for piece in text:
            nats = cross_entropy(model, collate([piece], pad_id))
            for total, g in zip(sums, torch.autograd.grad(nats, factors), strict=True):
                total.add_(g.to(total.dtype).square())
    return [total.div_(count_scored(text)) for total in sums]


def la_lora(setup: Setup, model: nn.Module) -> FactorPenalty | None:
    """The penalty that the options ask for; None where its strength is 0."""
    assert setup.options.strength is not None
    if setup.options.strength == 0:
        return None
    return FactorPenalty(
        model,
        list(setup.text),
        strength=setup.options.strength,
        pad_id=setup.tokenizer.pad_token_id,
    )
