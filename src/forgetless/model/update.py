"""The update that a model carries, to be made smaller, random or something else, and brought back:

U -> factor * U without touching anything but the adapter (or, with full fine-tuning, the target
weights). Costs a copy of what is trained.

    update = Update(model)           # before training: the base is what the weights are now
    ...train...
    update.keep()
    update.scale(0.5)                # half of what was kept; scale(1) is what was kept, bit for bit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from forgetless.model.targets import target_weights
from forgetless.model.weights import FullWeight, LowRankWeight, wider


class Update:
    """All target weights of one model.

    `names` chooses them for full fine-tuning, as in `target_weights`.
    """

    def __init__(self, model: nn.Module, *, names: str | None = None):
        self.weights = target_weights(model, names=names)
        self.keep()

    def keep(self) -> None:
        """Take the update as it is now for the one to scale and to bring back."""
        self._kept = [
            tuple(parameter.detach().clone() for parameter in weight.parameters)
            for weight in self.weights
        ]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Set every weight's update to `factor` times the kept one."""
        for weight, kept in zip(self.weights, self._kept, strict=True):
            if isinstance(weight, LowRankWeight):
                weight.A.copy_(kept[0])
                weight.B.copy_(kept[1] if factor == 1 else factor * kept[1])
            elif factor == 1:
                weight.W.copy_(kept[0])
            else:
                base = weight.oriented(weight.base_rows(slice(None)))  # as W
                weight.W.copy_(base + factor * (kept[0].to(base) - base))

    @torch.no_grad()
    def randomise(self, size: float, seed: int = 0) -> None:
        """Set every weight's update to a random one whose elements have root mean square `size`,
        the same direction at every call with this seed.
        """
        g = torch.Generator().manual_seed(seed)
        for weight in self.weights:
            if isinstance(weight, LowRankWeight):
                A = weight.A.to(wider(weight.A.dtype))
                noise = torch.randn(weight.B.shape, generator=g).to(A)
                product = float((noise.T @ noise * (A @ A.T)).sum()) / (
                    weight.shape[0] * weight.shape[1]
                )  # mean square of noise @ A
                weight.B.copy_(noise * (size / product**0.5))
            else:
                base = weight.oriented(weight.base_rows(slice(None)))  # as W
                weight.W.copy_(base + size * torch.randn(weight.W.shape, generator=g).to(base))

    def kept(self) -> Iterator[tuple[LowRankWeight, Tensor, Tensor]]:
        """Each weight with thin factors of its kept update, (out, r) and (r, in), in f32 or wider.

        Raises ValueError for weights trained themselves.
        """
        for weight, kept in zip(self.weights, self._kept, strict=True):
            if isinstance(weight, FullWeight):
                raise ValueError(
                    f"'{weight.name}' is trained itself; only adapters can be re-factored"
                )
            dtype = wider(weight.A.dtype)
            yield weight, weight.scale * kept[1].to(dtype), kept[0].to(dtype)

    @torch.no_grad()
    def factors(
        self, change: Callable[[LowRankWeight, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        """Set every LoRA weight's update to `change(weight, L, R)` -> (L', R'), thin factors of the
        same rank, from the kept L @ R = U in f32 or wider.
        """
        for weight, L, R in self.kept():
            new_L, new_R = change(weight, L, R)
            weight.A.copy_(new_R)
            weight.B.copy_(new_L / weight.scale)
