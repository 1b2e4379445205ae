"""Kronecker-factored Fisher of the base model's weights: which directions the general loss is
sensitive to (K-FAC, Martens and Grosse 2015, arXiv 1503.05671).

    A = mean over tokens of x x^T         inputs, one per layer input: q, k and v (gate and up)
                                          share theirs
    G = sum over tokens of d d^T / scored tokens       gradients of the sequences' summed loss with
                                                       respect to the layer's output
    energy = tr(G U A U^T),  half of which predicts the rise of the general loss in nats per token

It is the Fisher of the whole weight under two assumptions: x and d are independent, and so are the
tokens of a sequence. labels="sampled" takes the d of the true Fisher, "empirical" (default) those
of the text. Unlike a diagonal it knows that an update may move along directions that general text
never uses.

`rank=k` keeps rank k + constant diagonal of each covariance (see covariance.py). It costs one f32
(n, n) matrix per input and per weight's output, and n^2 operations per token: 92 GB for all linear
weights of an 8B Llama, until they are cut. `divide` (observing_recorder.py) sees one group of
weights per pass over the text, so that only a group's matrices are there at once: N passes, the
same result.

    recorder = Kronecker(model, "all-linear", rank=16)
    for batch in batches: recorder.observe(**batch)
    importance = recorder.finish()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.covariance import AnyCovariance, Covariance
from forgetless.importance.energy_errors import energy_errors
from forgetless.importance.entries import Entry, KroneckerEntry
from forgetless.importance.info import Settings
from forgetless.model.targets import BaseLayer
from forgetless.record.observing_recorder import ObservingRecorder


class Kronecker(ObservingRecorder):
    """Recorder of Kronecker factors; see the module, and `ObservingRecorder` for the arguments.

    `rank`: that of the low-rank form; None keeps whole matrices.
    """

    estimator = "kronecker"

    def __init__(
        self,
        model: nn.Module,
        names: str = "all-linear",
        *,
        labels: str = "empirical",
        rank: int | None = None,
        seed: int = 0,
    ):
        if rank is not None and rank < 1:
            raise OptionError(f"the rank of the covariances must be at least 1, found {rank}")
        super().__init__(model, names, labels=labels, seed=seed)
        self.rank = rank
        self._out: dict[str, Tensor] = {}
        self._in: dict[str, Tensor] = {}  # by the first weight that reads the input

    @property
    def cuts(self) -> bool:
        """Whether covariances are cut to a rank."""
        return self.rank is not None

    def _see(self, layer: BaseLayer, x: Tensor, d: Tensor | None, counts: Tensor) -> None:
        assert d is not None
        self._add(self._out, layer.name, d[counts])
        if self.leaders[layer.name] == layer.name:
            self._add(self._in, layer.name, x[counts])

    @staticmethod
    def _add(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
        """sums[name] += rows^T rows; rows (tokens, n)."""
        if name not in sums:
            n = rows.shape[1]
            sums[name] = torch.zeros(n, n, dtype=rows.dtype, device=rows.device)
        sums[name].addmm_(rows.T, rows)

    def _size(self, layer: BaseLayer) -> int:
        out, into = layer.shape
        leads = self.leaders.get(layer.name, layer.name) == layer.name
        return out**2 + into**2 if leads else out**2

    def _entries(self) -> dict[str, Entry]:
        missing = [layer.name for layer in self.observed if layer.name not in self._out]
        if missing:
            raise ValueError(
                f"'{missing[0]}' got no gradient from the general text; leave it out of --targets"
            )
        entries: dict[str, Entry] = {}
        # One whole covariance of an input and one of an output are there at a time.
        for leader, total in self._in.items():
            whole_in = Covariance(total / self.positions)
            cut_in = self._cut(whole_in)
            for layer in self.observed:
                if self.leaders[layer.name] != leader:
                    continue
                whole_out = Covariance(self._out[layer.name] / self.tokens)
                entry = KroneckerEntry(self._cut(whole_out), cut_in)
                entries[layer.name] = entry
                if self.rank is not None:
                    whole = KroneckerEntry(whole_out, whole_in)
                    self.errors[layer.name] = energy_errors(whole, entry)
        return entries

    def _cut(self, covariance: Covariance) -> AnyCovariance:
        return covariance if self.rank is None else covariance.cut(self.rank)

    def _sums(self) -> dict[str, dict[str, Tensor]]:
        return {"out": self._out, "in": self._in}

    def _settings(self) -> Settings:
        return {"labels": self.labels, "cov_rank": self.rank, "seed": self.seed}
