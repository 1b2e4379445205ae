"""Diagonal Fisher of the base model's weights, over whole sequences: which elements the general
loss is sensitive to.

    F_ij = (1 / scored tokens)  sum over sequences  ( sum over tokens t of  d_t,i x_t,j )^2

with x the layer's input and d the gradient of the sequence's summed loss with respect to the
layer's output: the squared gradient of one sequence, exactly, without a backward pass per sequence.

labels="sampled" (drawn from the model) makes it an unbiased estimate of the true Fisher's diagonal;
half the energy of a small update whose elements are independent is then the expected KL divergence
from the base, in nats per token. labels="empirical" (the text's own tokens; the default, and what
EWC implementations mostly compute: Kirkpatrick et al. 2017, arXiv 1612.00796) is the empirical
Fisher: what it predicts is less exact where the model fits the text badly (Kunstner et al. 2019,
arXiv 1905.12558).

Cost: one f32 tensor per target weight, a second one for a layer at a time; the operations of one
weight gradient per batch.

    recorder = Fisher(model, "q_proj,v_proj", labels="sampled")
    for batch in batches: recorder.observe(**batch)
    importance = recorder.finish()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgetless.importance.entries import DenseEntry, Entry
from forgetless.importance.info import Settings
from forgetless.model.targets import BaseLayer
from forgetless.model.weights import wider
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.sums import Sums, SumsByWeight


class Fisher(ObservingRecorder):
    """Recorder of the diagonal Fisher; see the module, and `ObservingRecorder` for arguments."""

    estimator = "fisher"

    def __init__(
        self,
        model: nn.Module,
        names: str = "all-linear",
        *,
        labels: str = "empirical",
        seed: int = 0,
    ):
        super().__init__(model, names, labels=labels, seed=seed)
        self._squares = Sums()

    def _see(self, layer: BaseLayer, x: Tensor, d: Tensor | None, counts: Tensor) -> None:
        assert d is not None
        total = self._of(layer)
        for x_one, d_one, counted in zip(x, d, counts, strict=True):
            g = d_one[counted].T @ x_one[counted]  # (out, in): one sequence's gradient
            total.addcmul_(g, g)

    def _of(self, layer: BaseLayer) -> Tensor:
        """The sum of one weight; zeros where it got no gradient."""
        if layer.name not in self._squares:
            weight = layer.module.weight
            self._squares[layer.name] = torch.zeros(
                layer.shape, dtype=wider(weight.dtype), device=weight.device
            )
        return self._squares[layer.name]

    def _size(self, layer: BaseLayer) -> int:
        return layer.shape[0] * layer.shape[1]

    def _entries(self) -> dict[str, Entry]:
        return {layer.name: DenseEntry(self._of(layer) / self.tokens) for layer in self.observed}

    def _sums(self) -> dict[str, SumsByWeight]:
        return {"squares": self._squares}

    def _settings(self) -> Settings:
        return {
            "labels": self.labels,
            "fisher": "empirical" if self.labels == "empirical" else "true, one draw per token",
            "seed": self.seed,
        }
