"""What an observing recorder sees of one pass: each layer's inputs and output gradients.

Gradients start at the output of the embeddings, so that no parameter is involved, and hooks hand
each layer's input x and output gradient d to whoever adds them up. The hooks are removed when the
pass ends, whatever happens in it.

    mask, targets = scored(input_ids, attention_mask, labels)
    counts = counting(mask, targets)                    # tokens that a scored one can depend on
    with watched(model, layers, counts, see, leaders, gradients=True) as base:
        ...one forward and backward pass...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model.adapters import bare
from forgetless.model.targets import BaseLayer
from forgetless.model.weights import wider

# What adds up one layer: (layer, x (batch, tokens, in), d (batch, tokens, out) or None, counts).
See = Callable[[BaseLayer, Tensor, Tensor | None, Tensor], None]
# Rows of logits whose labels are drawn at a time: their f64 probabilities stay small.
DRAWN_AT_ONCE = 256


def scored(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(attention mask (batch, tokens), what follows each token (batch, tokens - 1) or -100 where
    that is not scored).
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    follows = (input_ids if labels is None else labels)[:, 1:]
    # Nothing is predicted from padding, as the first token after left padding would be.
    return mask, follows.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)


def counting(mask: Tensor, targets: Tensor) -> Tensor:
    """Which tokens count, (batch, tokens): not padding, and none after the last scored one."""
    counts = torch.zeros_like(mask, dtype=torch.bool)
    counts[:, :-1] = (targets != -100).flip(1).cumsum(1).flip(1) > 0
    return counts & (mask != 0)


def positions_of(mask: Tensor, base: nn.Module) -> dict[str, Tensor]:
    """The positions of the tokens (batch, tokens) as the model is to be told them: counted from the
    first that is attended to, where padding stands before it. Models with learned positions would
    take the padding for text. Without such padding, nothing: the model counts itself.
    """
    if bool(mask[:, 0].bool().all()) or "position_ids" not in signature(base.forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def text_nats(logits: Tensor, targets: Tensor, seen: int) -> float:
    """The summed loss on the text itself, in nats; logits (scored, vocabulary), targets (scored,).

    Raises ValueError where it is no finite number; `seen`: tokens before these, for the message.
    """
    nats = nn.functional.cross_entropy(logits.detach(), targets, reduction="sum")
    if not bool(torch.isfinite(nats)):
        raise ValueError(
            f"the loss on the general text is {float(nats)} after {seen} tokens; "
            "use --dtype float32, or another model"
        )
    return float(nats)


def drawn_labels(logits: Tensor, random: torch.Generator) -> Tensor:
    """One label per row of logits (scored, vocabulary) from the model's distribution, by inverting
    its cumulative sum in f64 at uniform numbers.
    """
    uniform = torch.rand(len(logits), generator=random, dtype=torch.float64).to(logits.device)
    drawn = []
    for part, u in zip(logits.split(DRAWN_AT_ONCE), uniform.split(DRAWN_AT_ONCE), strict=True):
        below = part.double().softmax(1).cumsum(1)
        drawn.append(torch.searchsorted(below, u[:, None]).squeeze(1))
    return torch.cat(drawn).clamp(max=logits.shape[1] - 1)


@contextlib.contextmanager
def watched(
    model: nn.Module,
    layers: Sequence[BaseLayer],
    counts: Tensor,
    see: See | None,
    leaders: dict[str, str],
    gradients: bool,
) -> Iterator[Any]:
    """The bare base of `model`, with hooks on the embeddings and on every layer for one pass; they
    are removed on leaving.

    `see` is handed each layer's input and, with `gradients`, its output gradient, both in f32 or
    wider; None: nothing is added up. `leaders` (weight -> the first weight that reads the same
    input) is filled as the inputs are met.
    """
    watch = _Watch(counts, see, leaders, gradients)
    handles = []
    with bare(model) as base, torch.set_grad_enabled(gradients and see is not None):
        if gradients:
            # A copy, not the leaf itself: some models scale embeddings in place.
            start = lambda module, args, output: output.detach().requires_grad_(True).clone()
            embeddings: Any = base.get_input_embeddings
            handles.append(embeddings().register_forward_hook(start))
        for layer in layers:
            handles.append(layer.module.register_forward_hook(watch.hook(layer)))
        try:
            yield base
        finally:
            for handle in handles:
                handle.remove()


class WholeBatches:
    """Batches that are added up whole: one that fails half way is remembered, since observing it
    again would count it twice.
    """

    def __init__(self) -> None:
        self._torn = False  # a batch failed when some of it had been added

    @contextlib.contextmanager
    def one(self, see: See, random: torch.Generator) -> Iterator[See]:
        """What sees the layers of one batch; where that fails, `random` is as it was before."""
        before, some = random.get_state(), False

        def noted(layer: BaseLayer, x: Tensor, d: Tensor | None, counts: Tensor) -> None:
            nonlocal some
            some = True
            see(layer, x, d, counts)

        try:
            yield noted
        except BaseException:
            random.set_state(before)
            self._torn = some
            raise

    def check(self) -> None:
        """Raise ValueError where a batch was added half."""
        if self._torn:
            raise ValueError(
                "a batch failed when half of it had been added up, so the sums are of no text; "
                "make a new recorder, or load_state_dict of a state from before it"
            )


class _Watch:
    """One pass over the layers."""

    def __init__(self, counts: Tensor, see: See | None, leaders: dict[str, str], gradients: bool):
        self.counts, self.see, self.leaders, self.gradients = counts, see, leaders, gradients
        self.met: set[str] = set()  # layers that were called
        # By identity: an input with its first reader. Inputs are held, so that identities differ.
        self.inputs: dict[int, tuple[Tensor, str]] = {}

    def hook(self, layer: BaseLayer) -> Callable[..., None]:
        """A forward hook on this layer."""

        def forward(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = self._checked(layer, args[0])
            self.met.add(layer.name)
            first_reader = self.inputs.setdefault(id(args[0]), (args[0], layer.name))[1]
            self._follow(layer.name, first_reader)
            if self.see is not None:
                self._show(self.see, layer, x.detach(), output)

        return forward

    def _show(self, see: See, layer: BaseLayer, x: Tensor, output: Tensor) -> None:
        """Hand over the input now, or with the output's gradient once that is known."""
        counts, wide = self.counts, wider(x.dtype)
        if not self.gradients:
            see(layer, x.to(wide), None, counts)
        elif output.requires_grad:
            output.register_hook(
                lambda d: see(
                    layer,
                    x.to(wide),
                    d.detach().reshape(*counts.shape, -1).to(wider(d.dtype)),
                    counts,
                )
            )

    def _follow(self, name: str, leader: str) -> None:
        if self.leaders.setdefault(name, leader) != leader:
            raise ValueError(
                f"'{name}' shares its input with '{self.leaders[name]}' in one batch and with "
                f"'{leader}' in another; leave it out of --targets"
            )

    def _checked(self, layer: BaseLayer, x: Tensor) -> Tensor:
        """The input of a layer as (batch, tokens, in). Raises ValueError where it is not seen once,
        or does not see every token.
        """
        if layer.name in self.met:
            raise ValueError(
                f"'{layer.name}' is used twice in one forward pass; its gradient is a sum that "
                "cannot be seen in one place: leave it out of --targets"
            )
        rows = every_token(x, self.counts)
        if rows is None:
            batch, tokens = self.counts.shape
            raise ValueError(
                f"'{layer.name}' reads {tuple(x.shape)}, expected (batch, tokens, in) = "
                f"({batch}, {tokens}, {layer.shape[1]}); "
                "leave layers that see only some tokens (experts, encoders) out of --targets"
            )
        return rows


def every_token(x: Tensor, counts: Tensor) -> Tensor | None:
    """x (..., in) as (batch, tokens, in) where its rows are the tokens of a batch in their order,
    also flattened (OPT, shared experts) or with a dimension of one between (DeepSeek); else None.

    `counts`: (batch, tokens). Rows that an expert was sent are as many as all tokens by chance
    alone, and then not in the next batch.
    """
    batch, tokens = counts.shape
    sizes = [size for size in x.shape[:-1] if size != 1]
    forms = (batch, tokens), (batch * tokens,)
    if sizes not in [[size for size in form if size != 1] for form in forms]:
        return None
    return x.reshape(batch, tokens, x.shape[-1])
