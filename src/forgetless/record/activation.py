"""Mean squared inputs: columns of a weight that read large inputs matter (the norm that Wanda
prunes by, arXiv 2306.11695).

    Omega_ij = mean over tokens of x_j^2        a row of ones, a column of means: factored

The energy is the mean of ||U x||^2 over tokens without the correlations between inputs, in squared
units of the layer's output; it knows nothing of the loss. Cost: one forward pass, no backward pass,
one number per input column (layers that read the same input share it).

    recorder = Activation(model, "all-linear")
    for batch in batches: recorder.observe(**batch)
    importance = recorder.finish()
"""

from __future__ import annotations

from torch import Tensor, nn

from forgetless.importance.entries import Entry, FactoredEntry
from forgetless.importance.info import Settings
from forgetless.model.targets import BaseLayer
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.sums import Sums, SumsByWeight


class Activation(ObservingRecorder):
    """Recorder of the mean squared input of each column; see the module, and `ObservingRecorder`
    for the arguments.
    """

    estimator = "activation"
    unit = "squared layer output per token and squared weight"
    needs_gradients = False

    def __init__(self, model: nn.Module, names: str = "all-linear"):
        super().__init__(model, names)
        self._squares = Sums()

    def _see(self, layer: BaseLayer, x: Tensor, d: Tensor | None, counts: Tensor) -> None:
        if self.leaders[layer.name] == layer.name:
            squares = x[counts].square().sum(0)
            self._squares[layer.name] = self._squares.get(layer.name, 0) + squares

    def _size(self, layer: BaseLayer) -> int:
        return layer.shape[1]

    def _entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for layer in self.observed:
            means = self._squares[self.leaders[layer.name]] / self.positions  # (in,)
            entries[layer.name] = FactoredEntry(means.new_ones(layer.shape[0], 1), means[:, None])
        return entries

    def _sums(self) -> dict[str, SumsByWeight]:
        return {"squares": self._squares}

    def _settings(self) -> Settings:
        return {}
