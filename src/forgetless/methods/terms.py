"""Methods that look at general text while tuning: `kl` and `replay`.

    kl        loss = CE(domain) + weight * mean over tokens of KL(base || tuned), over the whole
              vocabulary, on a few general sequences per step
    replay    general text mixed in: its cross-entropy, a token of it counting as much as a token of
              the domain (arXiv 2502.06042)

The text is `--replay TEXT`: a file or data set, `self` (sampled from the base model: no data
needed), or for kl `domain` (the training rows themselves, as the anchor of arXiv 2509.23753, here
without that paper's reweighting of the cross-entropy).

Which sequences step t sees depends on the seed and t alone. They are read once per optimizer step,
whatever the accumulation, and before the data's gradients are there, so that clipping sees the sum
as with one loss. A resumed run goes on from the same place. All sequences are seen before any is
seen twice.

kl costs, per step, a forward pass without gradient and a forward and backward pass over
`--kl-sequences` sequences (2 beside 16 make 1.2 times the compute), and the logits of
`--batch-size` of them twice. With full fine-tuning it keeps one copy of what is trained; an adapter
is just switched off. replay costs what its tokens cost.

    forgetless tune MODEL --data domain.jsonl --method kl --replay self --out run

    term = KL(trainer.model, encode_documents(documents, tokenizer), weight=1.0)
    forgetless.add_term(trainer, term)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from forgetless.data.encoding import Encoded, batches, collate
from forgetless.evaluate.divergence import StoredBase, stored_kl
from forgetless.methods.divergence import kl_gradient
from forgetless.methods.method import Setup
from forgetless.model.adapters import bare, has_adapter
from forgetless.model.weights import wider


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, turn: int) -> tuple[int, ...]:
    """The order in which the indices below `count` are seen for the turn-th time."""
    return tuple(random.Random(f"{seed} {turn}").sample(range(count), count))


def places(count: int, start: int, stop: int, seed: int) -> list[int]:
    """Places `start` to `stop` of an endless list of indices below `count`.

    The list has all of them in an order drawn from the seed, then all in another, and so on.
    """
    return [_order(count, seed, place // count)[place % count] for place in range(start, stop)]


def count_scored(pieces: Sequence[Encoded]) -> int:
    """How many tokens of `pieces` are predicted: scored, and not the first of a sequence."""
    return sum(sum(scored[1:]) for _, scored in pieces)


class KL:
    """KL(base || tuned) in nats per token on `sequences` of `text` in every step, times `weight`.

    `text` is what `data.encoding.encode_documents` returns; every sequence in it must have a scored
    token. At most `batch_size` of them go through the model at once. With `stored`, what was kept
    of the base for each sequence (evaluate/divergence.py), the base is not run.
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
        stored: Sequence[StoredBase] | None = None,
    ):
        self.model = model
        self.text = list(text)
        self.stored = None if stored is None else list(stored)
        self.weight = weight
        self.sequences = sequences
        self.seed = seed
        self.pad_id = pad_id
        self.batch_size = batch_size or sequences
        self._seen: list[float] = []  # KL of the steps since the last log
        # What the base has in place of what is trained, where there is no adapter to switch off.
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        if stored is None and not has_adapter(model):
            trained = [p for p in model.parameters() if p.requires_grad]
            self._copies = [(p, p.detach().clone()) for p in trained]

    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of `scale * weight * KL` on the sequences of `step` to `.grad`."""
        first = step * self.sequences
        seen = places(len(self.text), first, first + self.sequences, self.seed)
        pieces = [self.text[i] for i in seen]
        tokens = count_scored(pieces)
        nats = 0.0
        waiting = iter(seen)
        for batch in batches(pieces, batch_size=self.batch_size, pad_id=self.pad_id):
            these = list(itertools.islice(waiting, len(batch["labels"])))
            nats += self._add_batch(batch, these, scale * self.weight / tokens)
        self._seen.append(nats / tokens)

    def _add_batch(self, batch: dict[str, Tensor], places: list[int], factor: float) -> float:
        """Add the gradient of `factor` times the divergence on a batch, the sequences at `places`;
        the divergence in nats, summed over tokens.
        """
        if self.stored is not None:
            with undisturbed(self.model):
                shown = self._shown(batch, [self.stored[place] for place in places])
                (factor * shown).backward()  # type: ignore[no-untyped-call]
            return float(shown.detach())
        with torch.no_grad(), self._base():
            base = scored_logits(self.model, batch)
        with undisturbed(self.model):
            tuned = scored_logits(self.model, batch)
            divergence, gradient = kl_gradient(tuned.detach(), base)
            gradient.mul_(factor)
            tuned.backward(gradient)  # type: ignore[no-untyped-call]
        return divergence

    def _shown(self, batch: dict[str, Tensor], bases: list[StoredBase]) -> Tensor:
        """The divergence from what is stored of the base, summed over a batch's scored tokens."""
        tuned = scored_logits(self.model, batch)
        targets = batch["labels"][:, 1:]
        said = targets[targets != -100].to(tuned.device)
        names = [field.name for field in dataclasses.fields(StoredBase)]
        parts = [torch.cat([getattr(base, name) for base in bases]) for name in names]
        together = StoredBase(*(part.to(tuned.device) for part in parts))
        return stored_kl(together, tuned, said).sum()

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
    """Cross-entropy of general sequences: for each token of the domain `share` tokens of them on
    average, each counting as one of the domain's.

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
        seed: int = 0,
        pad_id: int = 0,
        batch_size: int = 1,
    ):
        self.model = model
        self.text = list(text)
        self.seed = seed
        self.pad_id = pad_id
        self.batch_size = batch_size
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
            (nats * (scale / self.tokens_per_step)).backward()
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
    """The `KL` that the options ask for; None where its weight is 0."""
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
        stored=setup.stored,
    )


def replay_term(setup: Setup, model: nn.Module) -> Replay | None:
    """The `Replay` that the options ask for; None where --replay-share is 0."""
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
