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
pass of its own over the same text. What a finished group amounts to waits on the CPU. The result is
the same bit for bit: the passes differ only in which layers are watched.

    recorder.look(input_ids)                 # which weights read the same input: they stay together
    for _ in range(recorder.divide(4)):
        for batch in batches: recorder.observe(**batch)
        recorder.end_pass()

In several processes (torchrun), each observes its shard of the text and `skip`s the rest;
`end_pass` and `finish` add up what all have seen, so every process calls them.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.entries import Entry, from_plain, tier_of, to_plain, with_tensors
from forgetless.importance.importance import Importance
from forgetless.importance.info import EnergyErrors, Estimate
from forgetless.model import distributed, shards
from forgetless.model.adapters import bare
from forgetless.model.targets import BaseLayer, base_layers
from forgetless.model.weights import wider
from forgetless.record.passes import add_up_sums, in_groups
from forgetless.record.watching import counting, drawn_labels, scored, watched

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
        # Relative errors of each weight's energy, where what was summed is cut (energy_errors.py).
        self.errors: dict[str, tuple[float, float]] = {}
        # The groups of weights, each for a pass of its own, and what the current one sees.
        self._groups = [self.layers]
        self.group = 0
        self.observed = self.layers
        self._done: dict[str, Entry] = {}  # of the groups before
        self._first_pass: int | None = None  # tokens that the first pass saw
        # What the current pass has seen so far.
        self.tokens = 0  # scored
        self.positions = 0  # tokens that count as inputs
        self.sequences = 0  # rows with a scored token
        self._nats = 0.0
        self._random = torch.Generator().manual_seed(seed)
        self._added_up = False  # over the processes

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
    def _sums(self) -> dict[str, dict[str, Tensor]]:
        """The dictionaries whose tensors add up, for `state_dict`; loading fills them."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What the file should say about how it was made."""

    def observe(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> float:
        """Add one batch: input_ids, attention_mask and labels (batch, tokens), labels -100 where a
        token is not scored (default: all that are attended to).

        Returns the loss on the text itself in nats per scored token. Raises ValueError on a
        non-finite loss, before anything is added.
        """
        if self._added_up:
            raise ValueError(
                "the processes' sums have been added up, so nothing more can be observed; make a "
                "new recorder"
            )
        mask, targets = scored(input_ids, attention_mask, labels)
        is_scored = targets != -100
        counts = counting(mask, targets)
        if not bool(is_scored.any()):
            return 0.0
        with (
            bare(self.model) as base,
            torch.set_grad_enabled(self.needs_gradients),
            watched(
                base,
                self.observed,
                counts,
                self._see,
                self.leaders,
                gradients=self.needs_gradients,
            ),
        ):
            logits = base(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logits = logits[is_scored].to(wider(logits.dtype))  # (scored, vocabulary)
            nats = self._propagate(logits, targets[is_scored])
        self.tokens += int(is_scored.sum())
        self.positions += int(counts.sum())
        self.sequences += int(is_scored.any(1).sum())
        self._nats += nats
        return nats / int(is_scored.sum())

    def _propagate(self, logits: Tensor, targets: Tensor) -> float:
        """Go backward from logits (scored, vocabulary); the summed loss on the text itself."""
        text = nn.functional.cross_entropy(logits.detach(), targets, reduction="sum")
        if not bool(torch.isfinite(text)):
            raise ValueError(
                f"the loss on the general text is {float(text)} after {self.tokens} tokens; "
                "use --dtype float32, or another model"
            )
        if self.needs_gradients:
            if self.labels == "sampled":
                targets = drawn_labels(logits.detach(), self._random)
            nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        return float(text)

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
        with (
            bare(self.model) as base,
            torch.no_grad(),
            watched(base, self.layers, counts, None, self.leaders, gradients=self.needs_gradients),
        ):
            base(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)

    def bytes(self, groups: int = 1) -> int:
        """Bytes of the sums of the largest of so many groups: what has to fit into memory."""
        return max(sum(map(self._bytes_of, group)) for group in self._division(groups))

    def _bytes_of(self, layer: BaseLayer) -> int:
        return self._size(layer) * wider(layer.module.weight.dtype).itemsize

    def divide(self, groups: int) -> int:
        """Split the weights into so many groups of similar size, those that read the same input
        together; returns how many there are (never more than asked).

        Call it after `look`. Raises ValueError once something was observed.
        """
        if self.tokens or self._done:
            raise ValueError(
                "the weights are divided before anything is observed; make a new recorder"
            )
        self._groups = self._division(groups)
        self.observed = self._groups[0]
        return len(self._groups)

    @property
    def passes(self) -> int:
        """How many passes over the text there are to be: one per group."""
        return len(self._groups)

    def _division(self, groups: int) -> list[list[BaseLayer]]:
        """The weights in so many groups of similar size, those that share an input together."""
        return in_groups(self.layers, self.leaders, self._size, groups)

    def end_pass(self) -> None:
        """End a pass over the text: the next group begins.

        After the last one, `finish` is all that is left. Raises ValueError if nothing was observed.
        """
        self._add_up()
        self._check_observed()
        if self._first_pass not in (None, self.tokens):
            raise ValueError(
                f"pass {self.group + 1} saw {self.tokens} tokens, the first {self._first_pass}: "
                "give every pass the same text"
            )
        self._first_pass = self.tokens
        moved: dict[int, Any] = {}
        for name, entry in self._entries().items():
            self._done[name] = with_tensors(entry, lambda tensor: tensor.cpu(), moved)
        for sums in self._sums().values():
            sums.clear()
        self.group += 1
        if self.group < len(self._groups):
            self._begin(self.group)

    def _begin(self, group: int) -> None:
        self.group, self.observed = group, self._groups[group]
        self.tokens = self.positions = self.sequences = 0
        self._nats, self._added_up = 0.0, False
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
            add_up_sums(sums, names, device)
        counted = distributed.add_up_numbers(
            [self.tokens, self.positions, self.sequences, self._nats], device
        )
        self.tokens, self.positions, self.sequences = (int(number) for number in counted[:3])
        self._nats, self._added_up = counted[3], True

    def _check_observed(self) -> None:
        if self.tokens == 0:
            raise ValueError(
                "nothing was observed: call recorder.observe(input_ids, attention_mask, labels) "
                "on general text first"
            )

    def describe(self) -> str:
        """What is recorded, for people."""
        return self.estimator + (f", {self.labels} labels" if self.needs_gradients else "")

    def finish(self) -> Importance:
        """The importance of what was observed so far; of all processes, together.

        Raises ValueError if nothing was, or if something is not finite.
        """
        if self.group < len(self._groups):
            self._add_up()
        self._check_observed()
        if self.group < len(self._groups) - 1:
            raise ValueError(
                f"{self.group} of {len(self._groups)} passes have ended: observe the same text "
                "again, and call end_pass() after each pass"
            )
        if len(self._groups) > 1 and self.group < len(self._groups):
            self.end_pass()
        recorded = self._done or self._entries()
        entries = {layer.name: recorded[layer.name] for layer in self.layers}
        return Importance(entries, {}, self._estimate(entries).info())

    def _estimate(self, entries: dict[str, Entry]) -> Estimate:
        """What the file says about the importance. Raises ValueError where it is not finite."""
        norms = {name: entry.norm() for name, entry in entries.items()}
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise ValueError(
                    f"'{name}' has non-finite importance; record again with --dtype float32"
                )
        counted = {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "nats": self._nats / self.tokens,
        }
        errors = None
        if self.errors:
            by_weight = {name: list(self.errors[name]) for name in entries}
            errors = EnergyErrors(against=self.estimator, weights=by_weight)
        return Estimate(
            estimator=self.estimator,
            unit=self.unit,
            tier=tier_of(entries),
            settings={**self._settings(), **counted},
            norms=norms,
            energy_error=errors,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: tensors and plain numbers."""
        numbers = {
            "tokens": self.tokens,
            "positions": self.positions,
            "sequences": self.sequences,
            "nats": self._nats,
        }
        made: dict[int, Any] = {}
        passes = {
            "group": self.group,
            "tokens": self._first_pass,
            "groups": [[layer.name for layer in group] for group in self._groups],
            "errors": self.errors,
            "done": {name: to_plain(entry, made) for name, entry in self._done.items()},
        }
        return {
            "estimator": self.estimator,
            "targets": [layer.name for layer in self.layers],
            "leaders": self.leaders,
            "passes": passes,
            "numbers": numbers,
            "sums": self._sums(),
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises ValueError if it belongs to other target weights or another estimator.
        """
        layers, passes = {layer.name: layer for layer in self.layers}, state["passes"]
        if (state["estimator"], state["targets"]) != (self.estimator, list(layers)):
            raise ValueError(
                "the saved recorder state is for other target weights or another estimator; "
                "start again without --resume"
            )
        made: dict[int, Any] = {}
        self._groups = [[layers[name] for name in group] for group in passes["groups"]]
        self._done = {name: from_plain(plain, made) for name, plain in passes["done"].items()}
        self.errors = dict(passes["errors"])
        self.group, self._first_pass = passes["group"], passes["tokens"]
        self.observed = self._groups[min(self.group, len(self._groups) - 1)]
        for key, sums in self._sums().items():
            for name, tensor in state["sums"][key].items():
                sums[name] = tensor.to(layers[name].module.weight.device).clone()
        numbers = state["numbers"]
        self.tokens = numbers["tokens"]
        self.positions = numbers["positions"]
        self.sequences = numbers["sequences"]
        self._nats = numbers["nats"]
        self.leaders = dict(state["leaders"])
        self._random.set_state(state["random"])
