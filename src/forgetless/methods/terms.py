"""Methods that look at general text while tuning: `kl` and `replay`.

    kl        loss = CE(domain) + weight * mean over tokens of KL(base || tuned), over the whole
              vocabulary, on a few general sequences per step
    replay    general text mixed in: its cross-entropy, a token of it counting as much as a token of
              the domain (arXiv 2502.06042)

The text is `--replay TEXT`: a file or data set, `self` (sampled from the base model: no data
needed), or for kl `domain` (the training rows themselves, as the anchor of arXiv 2509.23753, here
without that paper's reweighting of the cross-entropy).

Which sequences step t sees depends on the seed and t alone: they are read once per optimizer step,
whatever the accumulation, before the data's gradients, so that clipping sees the sum as with one
loss; and again from the same place after a resume. All sequences are seen before any is seen twice.

Cost of kl per step: a forward pass without gradient and a forward and backward pass over
`--kl-sequences` sequences (with 2 beside 16: 1.2 times the compute), and the logits of
`--batch-size` of them twice; with full fine-tuning one copy of what is trained, else the adapter is
just switched off. Of replay: its share.

    forgetless tune MODEL --data domain.jsonl --method kl --replay self --out run term =
    KL(trainer.model, encode(documents, tokenizer), weight=1.0); forgetless.add_term(trainer, term)
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from forgetless.data.encoding import Encoded, batches, collate
from forgetless.methods.divergence import kl_gradient
from forgetless.methods.method import Setup
from forgetless.model.adapters import bare, has_adapter
from forgetless.model.weights import wider


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, turn: int) -> tuple[int, ...]:
    return tuple(random.Random(f"{seed} {turn}").sample(range(count), count))


def places(count: int, start: int, stop: int, seed: int) -> list[int]:
    """Places `start` to `stop` of an endless list of indices below `count`: all of them in an order
    drawn from the seed, then all in another, and so on.
    """
    return [_order(count, seed, place // count)[place % count] for place in range(start, stop)]


def scored_tokens(pieces: Sequence[Encoded]) -> int:
    """How many tokens of `pieces` are predicted: scored, and not the first of a sequence."""
    return sum(sum(scored[1:]) for _, scored in pieces)


class KL:
    """KL(base || tuned) on `sequences` of `text` in every step, times `weight` (nats per token);
    see the module.

    `text` is what `texts.encode` returns; sequences without a scored token must not be in it. At
    most `batch_size` of them go through the model at once.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Sequence[Encoded],
        *,
        weight: float = 1.0,
        sequences: int = 2,
        seed: int = 0,
        pad_id: int = 0,
        batch_size: int | None = None,
    ):
        self.model, self.text, self.weight, self.sequences, self.seed = (
            model,
            list(text),
            weight,
            sequences,
            seed,
        )
        self.pad_id, self.batch_size = pad_id, batch_size or sequences
        self._seen: list[float] = []  # KL of the steps since the last log
        adapted = has_adapter(model)
        self._copies = (
            []
            if adapted
            else [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        )

    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of `scale * weight * KL` on the sequences of `step` to `.grad`."""
        pieces = [
            self.text[i]
            for i in places(
                len(self.text), step * self.sequences, (step + 1) * self.sequences, self.seed
            )
        ]
        tokens, nats = scored_tokens(pieces), 0.0
        for batch in batches(pieces, batch_size=self.batch_size, pad_id=self.pad_id):
            with torch.no_grad(), self._base():
                base = scored_logits(self.model, batch)
            with undisturbed(self.model):
                tuned = scored_logits(self.model, batch)
                found, gradient = kl_gradient(tuned.detach(), base)
                tuned.backward(gradient.mul_(scale * self.weight / tokens))  # type: ignore[no-untyped-call]
            nats += found
        self._seen.append(nats / tokens)

    def logs(self) -> dict[str, float]:
        """Mean KL in nats per token over the steps since the last call; empty before the first."""
        seen, self._seen = self._seen, []
        return {"kl": sum(seen) / len(seen)} if seen else {}

    @contextlib.contextmanager
    def _base(self) -> Iterator[None]:
        """The model as its base: adapters off, or the copies in place of what is trained."""
        with bare(self.model):
            trained = [(p, p.data) for p, _ in self._copies]
            for p, copy in self._copies:
                p.data = copy
            try:
                yield
            finally:
                for p, data in trained:
                    p.data = data


class Replay:
    """Cross-entropy of general sequences in every step: on average `share` times the domain's
    tokens, each counting as one of the domain's.

    `tokens_per_step` are the domain's scored tokens of an average step. Where the share is less
    than a sequence per step, most steps see none.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Sequence[Encoded],
        *,
        share: float,
        tokens_per_step: float,
        seed: int = 0,
        pad_id: int = 0,
        batch_size: int = 1,
    ):
        self.model, self.text, self.seed, self.pad_id, self.batch_size = (
            model,
            list(text),
            seed,
            pad_id,
            batch_size,
        )
        self.tokens_per_step = tokens_per_step
        self.rate = (
            share * tokens_per_step / (scored_tokens(self.text) / len(self.text))
        )  # sequences per step
        self._nats, self._tokens = 0.0, 0

    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of the sequences of `step` to `.grad`."""
        pieces = [
            self.text[i]
            for i in places(
                len(self.text), int(step * self.rate), int((step + 1) * self.rate), self.seed
            )
        ]
        for start in range(0, len(pieces), self.batch_size):
            nats = cross_entropy(
                self.model, collate(pieces[start : start + self.batch_size], self.pad_id)
            )
            (nats * (scale / self.tokens_per_step)).backward()
            self._nats += float(nats.detach())
        self._tokens += scored_tokens(pieces)

    def logs(self) -> dict[str, float]:
        """Loss in nats per token of the sequences since the last call, and how many tokens they
        had.
        """
        nats, tokens, self._nats, self._tokens = self._nats, self._tokens, 0.0, 0
        return {"replay_loss": nats / tokens, "replay_tokens": tokens} if tokens else {}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, so that dropout neither adds noise nor draws random numbers; not with gradient
    checkpointing, which only works while training.
    """
    training = model.training
    model.train(training and bool(getattr(model, "is_gradient_checkpointing", False)))
    try:
        yield
    finally:
        model.train(training)


def scored_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (scored tokens, vocabulary) that predict the batch's scored tokens."""
    device = next(model.parameters()).device
    logits = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        use_cache=False,
    ).logits
    scored: Tensor = logits[:, :-1][(batch["labels"][:, 1:] != -100).to(logits.device)]
    return scored


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the batch's scored tokens, summed, in nats; in f32 or wider."""
    logits = scored_logits(model, batch)
    targets = batch["labels"][:, 1:]
    return nn.functional.cross_entropy(
        logits.to(wider(logits.dtype)), targets[targets != -100].to(logits.device), reduction="sum"
    )


def kl_term(setup: Setup, model: nn.Module) -> KL | None:
    """The term that the options ask for; None where its weight is 0."""
    o = setup.options
    assert o.kl_weight is not None and o.kl_sequences is not None
    if o.kl_weight == 0:
        return None
    return KL(
        model,
        setup.text,
        weight=o.kl_weight,
        sequences=o.kl_sequences,
        seed=o.seed,
        pad_id=setup.tokenizer.pad_token_id,
        batch_size=o.batch_size,
    )


def replay_term(setup: Setup, model: nn.Module) -> Replay | None:
    """The term that the options ask for; None where its share is 0."""
    o = setup.options
    assert o.replay_share is not None
    if o.replay_share == 0:
        return None
    return Replay(
        model,
        setup.text,
        share=o.replay_share,
        tokens_per_step=setup.tokens_per_step,
        seed=o.seed,
        pad_id=setup.tokenizer.pad_token_id,
        batch_size=o.batch_size,
    )
