"""What recorders see that only watch: each target layer's inputs x and output gradients d, over one
forward and backward pass of the bare base model.

    recorder.observe(input_ids, attention_mask, labels)     # adapters are switched off, parameters
        stay frozen, nothing gets a .grad
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
the same bit for bit: a pass differs from the whole only in which layers are watched.

In several processes (torchrun), each observes its share of the text and `skip`s the rest;
`end_pass` and `finish` add up what all have seen, so every process calls them.

    recorder.look(input_ids)                 # which weights read the same input: they stay together
    for _ in range(recorder.divide(4)):
        for batch in batches: recorder.observe(**batch)
        recorder.end_pass()
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.importance.entries import Entry, from_plain, to_plain, with_tensors
from forgetless.importance.importance import Importance
from forgetless.model import distributed, shards
from forgetless.model.adapters import bare
from forgetless.model.targets import BaseLayer, base_layers
from forgetless.model.weights import wider

LABELS = ("empirical", "sampled")


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
        if labels not in LABELS:
            raise OptionError(f"labels expects 'empirical' or 'sampled', found '{labels}'")
        self.model, self.labels, self.seed = model, labels, seed
        self.layers = base_layers(model, names)
        if any(shards.is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "the model is sharded by FSDP2, under which the bare base cannot be observed; "
                "record in one process or with DDP, "
                "on the model as it was loaded, before it is sharded"
            )
        self.observed = self.layers  # of these, what the current pass sees
        self.group = 0
        self._groups = [self.layers]
        self._done: dict[str, Entry] = {}  # of the groups before
        self.errors: dict[
            str, tuple[float, float]
        ] = {}  # of the energy, where what was summed is cut (energy_errors.py)
        self._first_pass: int | None = None  # tokens that it saw
        self.leaders: dict[str, str] = {}  # weight -> the first weight that reads the same input
        self.tokens = self.positions = self.sequences = (
            0  # scored; that count as inputs; rows with a scored token
        )
        self._nats = 0.0
        self._random = torch.Generator().manual_seed(seed)
        self._added_up = False

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
        mask, targets = _scored(input_ids, attention_mask, labels)
        scored = targets != -100
        counts = torch.zeros_like(input_ids, dtype=torch.bool)
        counts[:, :-1] = scored.flip(1).cumsum(1).flip(1) > 0
        counts &= mask != 0
        if not bool(scored.any()):
            return 0.0
        with (
            bare(self.model) as base,
            torch.set_grad_enabled(self.needs_gradients),
            self._watched(base, counts, self._see),
        ):
            logits = base(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logits = logits[scored].to(wider(logits.dtype))  # (scored, vocabulary)
            text = nn.functional.cross_entropy(logits.detach(), targets[scored], reduction="sum")
            if not bool(torch.isfinite(text)):
                raise ValueError(
                    f"the loss on the general text is {float(text)} after {self.tokens} tokens; "
                    "use --dtype float32, or another model"
                )
            if self.needs_gradients:
                drawn = (
                    targets[scored] if self.labels == "empirical" else self._draw(logits.detach())
                )
                nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        self.tokens += int(scored.sum())
        self.positions += int(counts.sum())
        self.sequences += int(scored.any(1).sum())
        self._nats += float(text)
        return float(text) / int(scored.sum())

    def skip(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        """Pass over a batch that another process observes, so that sampled labels are those of one
        process that sees all of the text.
        """
        if self.needs_gradients and self.labels == "sampled":
            torch.rand(
                int((_scored(input_ids, attention_mask, labels)[1] != -100).sum()),
                generator=self._random,
                dtype=torch.float64,
            )

    def look(self, input_ids: Tensor) -> None:
        """Find out which weights read the same input, by one forward pass over a row of token ids
        (1, tokens).
        """
        row = input_ids[:1]
        with (
            bare(self.model) as base,
            torch.no_grad(),
            self._watched(base, torch.ones_like(row, dtype=torch.bool), None),
        ):
            base(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False)

    def bytes(self, groups: int = 1) -> int:
        """Bytes of the sums of the largest of so many groups: what has to fit into memory at once."""
        return max(
            sum(self._size(layer) * wider(layer.module.weight.dtype).itemsize for layer in group)
            for group in self._division(groups)
        )

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
        together: dict[str, list[BaseLayer]] = {}
        for layer in self.layers:
            together.setdefault(self.leaders.get(layer.name, layer.name), []).append(layer)
        total, before = sum(self._size(layer) for layer in self.layers), 0
        found: dict[int, list[BaseLayer]] = {}
        for layers in together.values():
            size = sum(self._size(layer) for layer in layers)
            found.setdefault(int(groups * (before + size / 2) / total), []).extend(
                layers
            )  # by where its middle lies among all
            before += size
        return list(found.values())

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
        made: dict[int, Any] = {}
        entries = self._entries()
        self._done.update(
            {
                name: with_tensors(entry, lambda tensor: tensor.cpu(), made)
                for name, entry in entries.items()
            }
        )
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
        for leaders in distributed.collect(
            self.leaders
        ):  # a process without a batch knows neither these nor shapes
            self.leaders.update(leaders)
        device = self.layers[0].module.weight.device
        for sums in self._sums().values():
            kinds: dict[str, tuple[Any, Any]] = {}
            for found in distributed.collect(
                {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sums.items()}
            ):
                kinds.update(found)
            for name in (layer.name for layer in self.observed if layer.name in kinds):
                if name not in sums:
                    sums[name] = torch.zeros(kinds[name][0], dtype=kinds[name][1], device=device)
                distributed.add_up(sums[name])
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
        found = self._done or self._entries()
        entries = {layer.name: found[layer.name] for layer in self.layers}
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
        info = {
            "estimator": self.estimator,
            "unit": self.unit,
            "settings": {**self._settings(), **counted},
            "norms": norms,
        }
        if self.errors:
            info["energy_error"] = {
                "against": self.estimator,
                "weights": {name: list(self.errors[name]) for name in entries},
            }
        importance = Importance(entries, {}, info)
        return Importance(entries, {}, {**info, "tier": importance.tier})

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
        if (state["estimator"], state["targets"]) != (
            self.estimator,
            [layer.name for layer in self.layers],
        ):
            raise ValueError(
                "the saved recorder state is for other target weights or another estimator; "
                "start again without --resume"
            )
        layers, passes = {layer.name: layer for layer in self.layers}, state["passes"]
        made: dict[int, Any] = {}
        self._groups = [[layers[name] for name in group] for group in passes["groups"]]
        self._done = {name: from_plain(plain, made) for name, plain in passes["done"].items()}
        self.errors = dict(passes["errors"])
        self.group, self._first_pass = passes["group"], passes["tokens"]
        self.observed = self._groups[min(self.group, len(self._groups) - 1)]
        for key, part in self._sums().items():
            part.update(
                {
                    name: tensor.to(layers[name].module.weight.device).clone()
                    for name, tensor in state["sums"][key].items()
                }
            )
        numbers = state["numbers"]
        self.tokens, self.positions, self.sequences, self._nats = (
            numbers["tokens"],
            numbers["positions"],
            numbers["sequences"],
            numbers["nats"],
        )
        self.leaders = dict(state["leaders"])
        self._random.set_state(state["random"])

    def _draw(self, logits: Tensor) -> Tensor:
        """One label per row of logits (scored, vocabulary) from the model's distribution, by
        inverting its cumulative sum in f64 at uniform numbers.
        """
        uniform = torch.rand(len(logits), generator=self._random, dtype=torch.float64).to(
            logits.device
        )
        drawn = [
            torch.searchsorted(part.double().softmax(1).cumsum(1), u[:, None]).squeeze(1)
            for part, u in zip(logits.split(256), uniform.split(256), strict=True)
        ]
        return torch.cat(drawn).clamp(max=logits.shape[1] - 1)

    @contextlib.contextmanager
    def _watched(self, base: nn.Module, counts: Tensor, see: Any) -> Iterator[None]:
        """Hooks on the embeddings and on every layer observed, or on all where `see` is None, for
        one pass; removed on leaving, whatever happens.
        """
        inputs: dict[
            int, tuple[Tensor, str]
        ] = {}  # by identity: input, its first reader; held, so that identities stay apart
        seen: set[str] = set()
        handles = []
        if self.needs_gradients:
            # A copy, not the leaf itself: some models scale embeddings in place.
            start = lambda module, args, output: output.detach().requires_grad_(True).clone()
            handles.append(base.get_input_embeddings().register_forward_hook(start))

        def watch(layer: BaseLayer) -> Any:
            def forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                _check_use(layer, args[0], counts, layer.name in seen)
                seen.add(layer.name)
                self._follow(layer.name, inputs.setdefault(id(args[0]), (args[0], layer.name))[1])
                x = args[0].detach()
                if see is None:
                    return
                if not self.needs_gradients:
                    see(layer, x.to(wider(x.dtype)), None, counts)
                elif output.requires_grad:
                    output.register_hook(
                        lambda d: see(
                            layer, x.to(wider(x.dtype)), d.detach().to(wider(d.dtype)), counts
                        )
                    )

            return forward

        handles += [
            layer.module.register_forward_hook(watch(layer))
            for layer in (self.layers if see is None else self.observed)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, name: str, leader: str) -> None:
        if self.leaders.setdefault(name, leader) != leader:
            raise ValueError(
                f"'{name}' shares its input with '{self.leaders[name]}' in one batch and with "
                f"'{leader}' in another; leave it out of --targets"
            )


def _scored(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(attention mask (batch, tokens), what follows each token (batch, tokens - 1) or -100 where
    that is not scored).
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # Nothing is predicted from padding, as the first token after left padding would be.
    return mask, (input_ids if labels is None else labels)[:, 1:].masked_fill(
        (mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100
    )


def _check_use(layer: BaseLayer, x: Tensor, counts: Tensor, again: bool) -> None:
    if again:
        raise ValueError(
            f"'{layer.name}' is used twice in one forward pass; its gradient is a sum that "
            "cannot be seen in one place: leave it out of --targets"
        )
    if x.ndim != 3 or x.shape[:2] != counts.shape:
        raise ValueError(
            f"'{layer.name}' reads {tuple(x.shape)}, expected (batch, tokens, in) = "
            f"({counts.shape[0]}, {counts.shape[1]}, {layer.shape[1]}); "
            "leave layers that see only some tokens (experts, encoders) out of --targets"
        )
