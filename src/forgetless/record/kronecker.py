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

`rank=k` keeps rank k + constant diagonal of each covariance (see covariance.py), and tracks those
of wide layers along 2k directions while the text goes by (tracked.py): 2.3 GB for all linear
weights of an 8B Llama at rank 64. Without a rank each is one f32 (n, n) matrix, which takes n^2
operations per token, 92 GB together; `importance.to_tier("kronecker:64")` cuts those exactly.
`divide` (observing_recorder.py) sees one group of weights per pass over the text, so that only a
group's sums are there at once: N passes, the same result.

    recorder = Kronecker(model, "all-linear", rank=16)
    for batch in batches: recorder.observe(**batch)
    importance = recorder.finish()
"""

from __future__ import annotations

from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.covariance import AnyCovariance
from forgetless.importance.energy_errors import energy_errors
from forgetless.importance.entries import Entry, KroneckerEntry
from forgetless.importance.info import Settings
from forgetless.model.targets import BaseLayer
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.sums import CovarianceSums, SumsByWeight, summed_numbers


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
        self._out = CovarianceSums(rank)
        self._in = CovarianceSums(rank)  # by the first weight that reads the input

    @property
    def cuts(self) -> bool:
        """Whether covariances are cut to a rank."""
        return self.rank is not None

    def _see(self, layer: BaseLayer, x: Tensor, d: Tensor | None, counts: Tensor) -> None:
        assert d is not None
        self._out.add(layer.name, d[counts])
        if self.leaders[layer.name] == layer.name:
            self._in.add(layer.name, x[counts])

    def _size(self, layer: BaseLayer) -> int:
        out, into = layer.shape
        leads = self.leaders.get(layer.name, layer.name) == layer.name
        shared = summed_numbers(into, self.rank) if leads else 0
        return summed_numbers(out, self.rank) + shared

    def _entries(self) -> dict[str, Entry]:
        missing = [layer.name for layer in self.observed if layer.name not in self._out]
        if missing:
            raise ValueError(
                f"'{missing[0]}' got no gradient from the general text; leave it out of --targets"
            )
        entries: dict[str, Entry] = {}
        # One whole covariance of an input and one of an output are there at a time.
        for leader in self._in.names():
            seen_in = self._in.covariance(leader, self.positions)
            cut_in = self._cut(seen_in)
            for layer in self.observed:
                if self.leaders[layer.name] != leader:
                    continue
                seen_out = self._out.covariance(layer.name, self.tokens)
                entry = KroneckerEntry(self._cut(seen_out), cut_in)
                entries[layer.name] = entry
                # What was tracked was never whole, so nobody knows what the cut did to it.
                if self.rank is not None and seen_in.rank is None and seen_out.rank is None:
                    whole = KroneckerEntry(seen_out, seen_in)
                    self.errors[layer.name] = energy_errors(whole, entry)
        return entries

    def _cut(self, covariance: AnyCovariance) -> AnyCovariance:
        return covariance if self.rank is None else covariance.cut(self.rank)

    def _sums(self) -> dict[str, SumsByWeight]:
        return {"out": self._out, "in": self._in}

    def _settings(self) -> Settings:
        return {"labels": self.labels, "cov_rank": self.rank, "seed": self.seed}
