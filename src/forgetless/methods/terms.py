"""What the methods that look at general text while tuning share, and `replay`, one of them.

    kl        the divergence from the base, methods/kl.py
    replay    general text mixed in: its cross-entropy, a token of it counting as much as a token of
              the domain (arXiv 2502.06042)

The text is `--replay TEXT`: a file or data set, or what the base model says itself. It is read once
per optimizer step, whatever the accumulation, and before the data's gradients are there, so that
clipping sees the sum as with one loss. Which sequences step t sees depends on the seed and t alone,
so that a resumed run goes on from the same place. replay costs what its tokens cost.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from forgetless.data.encoding import Encoded, collate
from forgetless.methods.method import Setup
from forgetless.model.head import logits_at
from forgetless.model.weights import wider


@functools.lru_cache(maxsize=2)
def order_of_turn(count: int, seed: int, turn: int) -> tuple[int, ...]:
    """The order in which the indices below `count` are seen for the turn-th time."""
    return tuple(random.Random(f"{seed} {turn}").sample(range(count), count))


def places(count: int, start: int, stop: int, seed: int) -> list[int]:
    """Places `start` to `stop` of an endless list of indices below `count`.

    The list has all of them in an order drawn from the seed, then all in another, and so on.
    """
    return [
        order_of_turn(count, seed, place // count)[place % count] for place in range(start, stop)
    ]


def count_scored(pieces: Sequence[Encoded]) -> int:
    """How many tokens of `pieces` are predicted: scored, and not the first of a sequence."""
    return sum(sum(scored[1:]) for _, scored in pieces)


class Replay:
    """Cross-entropy of general sequences: for each token of the domain `share` tokens of them on
    average, each counting as `weight` of the domain's.

    `tokens_per_step` are the domain's scored tokens of an average step. Where `share` makes less
    than a sequence per step, most steps see none.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Sequence[Encoded],
        *,
        share: float,
        tokens_per_step: float,
        weight: float = 1.0,
        seed: int = 0,
        pad_id: int = 0,
        batch_size: int = 1,
    ):
        self.model = model
        self.text = list(text)
        self.seed = seed
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.weight = weight
        self.tokens_per_step = tokens_per_step
        tokens_per_sequence = count_scored(self.text) / len(self.text)
        self.rate = share * tokens_per_step / tokens_per_sequence  # sequences per step
        self._nats = 0.0
        self._tokens = 0

    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of the sequences of `step` to `.grad`."""
        first, stop = int(step * self.rate), int((step + 1) * self.rate)
        pieces = [self.text[i] for i in places(len(self.text), first, stop, self.seed)]
        for start in range(0, len(pieces), self.batch_size):
            batch = collate(pieces[start : start + self.batch_size], self.pad_id)
            nats = cross_entropy(self.model, batch)
            (nats * (scale * self.weight / self.tokens_per_step)).backward()
            self._nats += float(nats.detach())
        self._tokens += count_scored(pieces)

    def logs(self) -> dict[str, float]:
        """Loss in nats per token of the sequences since the last call, and how many tokens they
        had.
        """
        nats, tokens = self._nats, self._tokens
        self._nats, self._tokens = 0.0, 0
        return {"replay_loss": nats / tokens, "replay_tokens": tokens} if tokens else {}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, so that dropout neither adds noise nor draws random numbers.

    With gradient checkpointing, which only works in training mode, the mode stays.
    """
    training = model.training
    model.train(training and _recomputes(model))
    try:
        yield
    finally:
        model.train(training)


def _recomputes(model: nn.Module) -> bool:
    """Whether activations are recomputed in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def scored_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (scored tokens, vocabulary) that predict the batch's scored tokens.

    The head is asked for these alone.
    """
    device = next(model.parameters()).device
    predicted = batch["labels"] != -100
    places = nn.functional.pad(predicted[:, 1:], (0, 1)).to(device)  # of the tokens before them
    return logits_at(
        model,
        places,
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        use_cache=False,
    )


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the batch's scored tokens, summed, in nats; in f32 or wider."""
    logits = scored_logits(model, batch)
    targets = batch["labels"][:, 1:]
    return nn.functional.cross_entropy(
        logits.to(wider(logits.dtype)), targets[targets != -100].to(logits.device), reduction="sum"
    )


def replay_term(setup: Setup, model: nn.Module) -> Replay | None:
    """The `Replay` that the options ask for; None where --replay-share or its weight is 0."""
    o = setup.options
    assert o.replay_share is not None
    weight = 1.0 if o.replay_weight is None else o.replay_weight
    if o.replay_share == 0 or weight == 0:
        return None
    return Replay(
        model,
        setup.text,
        share=o.replay_share,
        tokens_per_step=setup.tokens_per_step,
        weight=weight,
        seed=o.seed,
        pad_id=setup.tokenizer.pad_token_id,
        batch_size=o.batch_size,
    )
