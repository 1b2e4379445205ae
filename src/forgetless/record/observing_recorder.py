"""Recorders that only watch the bare base model over some text: what they share.

An observing recorder is shown each target layer's inputs x and output gradients d, over one forward
and backward pass of the bare base model for each batch. Adapters are switched off, parameters stay
frozen, and nothing gets a .grad.

    recorder.observe(input_ids, attention_mask, labels)
    importance = recorder.finish()

The loss is the sum of cross-entropy (nats) over scored tokens, so d is what one token's output does
to the whole sequence's loss. Its labels are

    empirical   the tokens of the text: gives what is called the empirical Fisher
    sampled     drawn from the model's own predictive distribution at every scored token: gives the
                true Fisher (the Gauss-Newton matrix of the KL divergence)

Tokens that count are those a scored token can depend on: not padding, not after the last scored
one. Gradients start at the embeddings' output, so no parameter is involved; there is no per-example
backward pass. Memory is that of one batch's activations, and of the sums that an estimator keeps:
it does not grow with the text. Sampled labels come from one stream of random numbers in the order
of the text, whatever the batch size.

Where the sums of all weights do not fit, `divide` splits the weights into groups, each seen in a
pass of its own over the same text (division.py).

    recorder.look(input_ids)                 # which weights read the same input: they stay together
    for _ in range(recorder.divide(4)):
        for batch in batches: recorder.observe(**batch)
        recorder.end_pass()

In several processes (torchrun), each observes its shard of the text and `skip`s the rest;
`end_pass` and `finish` add up what all have seen, so every process calls them.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.entries import Entry, tier_of
from forgetless.importance.importance import Importance
from forgetless.importance.info import Estimate, Settings, finite_norms, of_model
from forgetless.model import distributed, shards
from forgetless.model.targets import BaseLayer, base_layers
from forgetless.model.weights import wider
from forgetless.record.division import Division, in_groups
from forgetless.record.observing_state import ObservingState
from forgetless.record.seen import Seen
from forgetless.record.state import StateDict
from forgetless.record.sums import SumsByWeight
from forgetless.record.watching import (
    See,
    WholeBatches,
    counting,
    drawn_labels,
    positions_of,
    scored,
    text_nats,
    watched,
)

LABEL_KINDS = ("empirical", "sampled")


class ObservingRecorder(abc.ABC):
    """A recorder that needs no adapter and no optimizer.

    Estimators are its final subclasses: they say what to add up, and what it means.

    Args:
        model: bare, or with adapters, which are switched off while observing.
        names: target weights, as in `weights.matching`.
        labels: "empirical" or "sampled" (see the module).
        seed: of sampled labels.

    Raises OptionError for wrong settings, ValueError where the bare base cannot be had (merged
    adapters, PiSSA and the like).
    """

    estimator: str
    unit = "nats per token and squared weight"
    needs_gradients = True

    def __init__(
        self,
        model: nn.Module,
        names: str = "all-linear",
        *,
        labels: str = "empirical",
        seed: int = 0,
    ):
        if labels not in LABEL_KINDS:
            raise OptionError(f"labels expects 'empirical' or 'sampled', found '{labels}'")
        self.model, self.labels, self.seed = model, labels, seed
        self.layers = base_layers(model, names)
        if any(shards.is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "the model is sharded by FSDP2, under which the bare base cannot be observed; "
                "record in one process or with DDP, "
                "on the model as it was loaded, before it is sharded"
            )
        self.leaders: dict[str, str] = {}  # weight -> the first weight that reads the same input
        self._division = Division(self.layers)
        self._seen = Seen()  # by the present pass
        self._added_up = False  # over the processes
        self._batches = WholeBatches()
        self._random = torch.Generator().manual_seed(seed)

    @property
    def observed(self) -> list[BaseLayer]:
        """The layers that the present pass sees: all, or those of one group."""
        return self._division.observed

    @property
    def tokens(self) -> int:
        """Scored tokens that the present pass has seen so far."""
        return self._seen.tokens

    @property
    def positions(self) -> int:
        """Tokens that count as inputs, of those that the present pass has seen so far."""
        return self._seen.positions

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """Relative errors of each weight's energy, where an estimator cuts what it has summed."""
        return self._division.errors

    @property
    def cuts(self) -> bool:
        """Whether what a finished group amounts to takes less room than its sums."""
        return False

    @abc.abstractmethod
    def _see(self, layer: BaseLayer, x: Tensor, d: Tensor | None, counts: Tensor) -> None:
        """Add up one layer: x (batch, tokens, in) and d (batch, tokens, out), both in f32 or wider;
        counts (batch, tokens).
        """

    @abc.abstractmethod
    def _entries(self) -> dict[str, Entry]:
        """The importance of each observed weight from the sums."""

    @abc.abstractmethod
    def _size(self, layer: BaseLayer) -> int:
        """How many numbers the sums of one weight are; those of a shared input count for the weight
        that reads it first.
        """

    @abc.abstractmethod
    def _sums(self) -> dict[str, SumsByWeight]:
        """What adds up, for `state_dict`; loading fills it."""

    @abc.abstractmethod
    def _settings(self) -> Settings:
        """What the file should say about how it was made."""

    def observe(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> float:
        """Add one batch: input_ids, attention_mask and labels (batch, tokens), labels -100 where a
        token is not scored (default: all that are attended to).

        Returns nats per scored token of the text itself. Raises ValueError on a non-finite loss,
        before anything is added. Once a batch fails half way, nothing goes on.
        """
        self._batches.check()
        if self._added_up:
            raise ValueError(
                "the processes' sums have been added up; make a new recorder to observe more"
            )
        mask, targets = scored(input_ids, attention_mask, labels)
        is_scored = targets != -100
        counts = counting(mask, targets)
        if not bool(is_scored.any()):
            return 0.0
        with (
            self._batches.one(self._see, self._random) as see,
            self._watched(self.observed, counts, see) as base,
        ):
            places = positions_of(mask, base)
            said = base(input_ids=input_ids, attention_mask=mask, use_cache=False, **places)
            logits = said.logits[:, :-1][is_scored]  # (scored, vocabulary)
            nats = self._propagate(logits.to(wider(logits.dtype)), targets[is_scored])
        self._seen.add(is_scored, counts, nats)
        return nats / int(is_scored.sum())

    def _propagate(self, logits: Tensor, targets: Tensor) -> float:
        """Go backward from logits (scored, vocabulary); the summed loss on the text itself."""
        nats = text_nats(logits, targets, self.tokens)
        if self.needs_gradients:
            if self.labels == "sampled":
                targets = drawn_labels(logits.detach(), self._random)
            nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        return nats

    def skip(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        """Pass over a batch that another process observes, so that sampled labels are those of one
        process that sees all of the text.
        """
        if self.needs_gradients and self.labels == "sampled":
            _, targets = scored(input_ids, attention_mask, labels)
            count = int((targets != -100).sum())
            torch.rand(count, generator=self._random, dtype=torch.float64)

    def look(self, input_ids: Tensor) -> None:
        """Find out which weights read the same input, by one forward pass over a row of token ids
        (1, tokens).
        """
        row = input_ids[:1]
        counts = torch.ones_like(row, dtype=torch.bool)
        with self._watched(self.layers, counts, None) as base:
            base(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)

    def _watched(
        self, layers: Sequence[BaseLayer], counts: Tensor, see: See | None
    ) -> AbstractContextManager[Any]:
        """The bare base for one pass in which these layers are watched."""
        return watched(self.model, layers, counts, see, self.leaders, self.needs_gradients)

    def bytes(self, groups: int = 1) -> int:
        """Bytes of the sums of the largest of so many groups: what has to fit into memory."""
        of_layer = lambda layer: self._size(layer) * wider(layer.module.weight.dtype).itemsize
        return max(sum(map(of_layer, group)) for group in self._in_groups(groups))

    def divide(self, groups: int) -> int:
        """Split the weights into so many groups of similar size, those that read the same input
        together; returns how many there are (never more than asked).

        Call it after `look`. Raises ValueError once something was observed.
        """
        if self.tokens or self._division.done:
            raise ValueError(
                "the weights are divided before anything is observed; make a new recorder"
            )
        self._division.divide(self._in_groups(groups))
        return self.passes

    @property
    def passes(self) -> int:
        """How many passes over the text there are to be: one per group."""
        return len(self._division.groups)

    def _in_groups(self, groups: int) -> list[list[BaseLayer]]:
        """The weights in so many groups of similar size, those that share an input together."""
        return in_groups(self.layers, self.leaders, self._size, groups)

    def end_pass(self) -> None:
        """End a pass over the text: the next group begins.

        After the last one, `finish` is all that is left. Raises ValueError if nothing was observed.
        """
        self._batches.check()
        self._add_up()
        self._seen.check()
        self._division.check_same_text(self.tokens)
        self._division.end_pass(self._entries())
        for sums in self._sums().values():
            sums.clear()
        if not self._division.has_ended:
            self._seen, self._added_up = Seen(), False
            self._random.manual_seed(self.seed)  # every pass draws the same labels

    def _add_up(self) -> None:
        """Add up what the processes have observed of this pass, together, one weight at a time;
        nothing to do in one process.
        """
        if self._added_up or not distributed.running():
            return
        # A process without a batch knows neither which weights share an input nor the shapes.
        for leaders in distributed.collect(self.leaders):
            self.leaders.update(leaders)
        device = self.layers[0].module.weight.device
        names = [layer.name for layer in self.observed]
        for sums in self._sums().values():
            sums.add_up(names, device)
        self._seen, self._added_up = self._seen.of_all_processes(device), True

    def describe(self) -> str:
        """What is recorded, for people."""
        return self.estimator + (f", {self.labels} labels" if self.needs_gradients else "")

    def finish(self) -> Importance:
        """The importance of what was observed so far; of all processes, together. Raises ValueError
        if nothing was, or if something is not finite.
        """
        self._batches.check()
        division = self._division
        if not division.has_ended:
            self._add_up()
        self._seen.check()
        if not division.is_last:
            raise ValueError(
                f"{division.group} of {self.passes} passes have ended: observe the same text "
                "again, and call end_pass() after each pass"
            )
        if self.passes > 1 and not division.has_ended:
            self.end_pass()
        recorded = division.done or self._entries()
        entries = {layer.name: recorded[layer.name] for layer in self.layers}
        return Importance(entries, {}, {**self._estimate(entries).info(), **of_model(self.model)})

    def _estimate(self, entries: dict[str, Entry]) -> Estimate:
        """What the file says about the importance. Raises ValueError where it is not finite."""
        return Estimate(
            estimator=self.estimator,
            unit=self.unit,
            tier=tier_of(entries),
            settings={**self._settings(), **self._seen.settings()},
            norms=finite_norms(entries),
            energy_error=self._division.energy_errors(self.estimator, entries),
        )

    def state_dict(self) -> StateDict:
        """Everything needed to go on later: tensors and plain numbers."""
        self._batches.check()
        state = ObservingState(
            estimator=self.estimator,
            targets=[layer.name for layer in self.layers],
            leaders=self.leaders,
            passes=self._division.state(),
            numbers=self._seen,
            sums={key: sums.state() for key, sums in self._sums().items()},
            random=self._random.get_state(),
        )
        return state.plain()

    def load_state_dict(self, plain: StateDict) -> None:
        """Go on from `state_dict()`.

        Raises ValueError if it belongs to other target weights or another estimator.
        """
        layers = {layer.name: layer for layer in self.layers}
        state = ObservingState.of(plain, self.estimator, list(layers))
        self._division.restore(state.passes, layers)
        devices = {name: layer.module.weight.device for name, layer in layers.items()}
        for key, sums in self._sums().items():
            sums.restore(state.sums[key], devices)
        self._batches = WholeBatches()
        self._seen = state.numbers
        self.leaders = dict(state.leaders)
        self._random.set_state(state.random)
