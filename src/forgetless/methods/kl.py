"""`kl`: predictions on general text held to the base's.

    loss = CE(domain) + weight * mean over tokens of KL(base || tuned), over the whole vocabulary,
           on a few general sequences per step

The text is `--replay TEXT`: a file or data set, what the base says itself (`chat`, `self`: no data
needed), what an importance file keeps of that (`kept`: the base is not run either), or `domain`
(the training rows themselves, as the anchor of arXiv 2509.23753, here without that paper's
reweighting of the cross-entropy).

Which sequences step t sees depends on the seed and t alone. All are seen before any is seen twice,
and those of one step have like lengths, so that little is padded. With `every` N the term is added
at each N-th step with N times the weight, which is the same in expectation. Sequences may count
differently (methods/kinds.py).

Per step it costs a forward and backward pass over `--kl-sequences` sequences, of which the head is
asked where something is scored alone, and where nothing is stored a forward pass of the base. With
full fine-tuning and nothing stored it keeps one copy of what is trained; an adapter is just
switched off.

    forgetless tune MODEL --data domain.jsonl --method kl --replay self --out run

    term = KL(trainer.model, encode_documents(documents, tokenizer), weight=1.0)
    forgetless.add_term(trainer, term)
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forgetless.data.encoding import Encoded, collate
from forgetless.evaluate.divergence import StoredBase
from forgetless.methods.base_of import BaseOf
from forgetless.methods.divergence import kl_gradient, stored_gradient
from forgetless.methods.kinds import sequence_weights
from forgetless.methods.method import Setup
from forgetless.methods.terms import count_scored, order_of_turn, scored_logits, undisturbed
from forgetless.model.quantised import keep_differentiable

# Steps among whose sequences those of like length are looked for: with 2 of 64 answers a step, 3 %
# of their tokens are padding, and 22 % without.
MATCHED_STEPS = 8
# Sequences over which `recent` is a mean, at least: a single answer's divergence is often twice or
# half that of another.
RECENT_SEQUENCES = 10


class KL:
    """KL(base || tuned) in nats per token on `sequences` of `text` in every step, times `weight`.

    `text` is what `data.encoding.encode_documents` returns; every sequence in it must have a scored
    token. At most `batch_size` of them go through the model at once. With `stored`, what was kept
    of the base for each sequence (evaluate/divergence.py), the base is not run. `weights` says how
    much each sequence counts, 1 on average; what is logged counts them alike. `weight` may be set
    between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Sequence[Encoded],
        *,
        weight: float = 1.0,
        sequences: int = 2,
        every: int = 1,
        seed: int = 0,
        pad_id: int = 0,
        batch_size: int | None = None,
        stored: Sequence[StoredBase] | None = None,
        weights: Sequence[float] | None = None,
    ):
        keep_differentiable(model)
        self.model = model
        self.text = list(text)
        self.stored = None if stored is None else list(stored)
        self.weights = weights
        self.weight = weight
        self.sequences = sequences
        self.every = every
        self.seed = seed
        self.pad_id = pad_id
        self.batch_size = batch_size or sequences
        self._lengths = tuple(len(ids) for ids, _ in self.text)
        self._unlogged: list[float] = []  # KL of the steps since the last log
        # Nats and tokens of the last steps.
        self.last: deque[tuple[float, int]] = deque(maxlen=-(-RECENT_SEQUENCES // sequences))
        self._base = BaseOf(model) if stored is None else None

    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of `scale * weight * KL` on the sequences of `step` to `.grad`.

        With `every` N that is at the last of N steps, with N times the weight.
        """
        if (step + 1) % self.every:
            return
        seen = matched_places(self._lengths, self.sequences, step // self.every, self.seed)
        tokens = count_scored([self.text[place] for place in seen])
        factor = scale * self.weight * self.every / tokens
        nats = 0.0
        for start in range(0, len(seen), self.batch_size):
            nats += self._add_batch(seen[start : start + self.batch_size], factor)
        self._unlogged.append(nats / tokens)
        self.last.append((nats, tokens))

    def _add_batch(self, places: Sequence[int], factor: float) -> float:
        """Add the gradient of `factor` times the divergence on the sequences at `places`; the
        divergence in nats, summed over tokens.
        """
        batch = collate([self.text[place] for place in places], self.pad_id)
        base = None
        if self._base is not None:
            with torch.no_grad(), self._base:
                base = scored_logits(self.model, batch)
        with undisturbed(self.model):
            tuned = scored_logits(self.model, batch)
            if base is not None:
                nats, gradient = kl_gradient(tuned.detach(), base)
            else:
                targets = batch["labels"][:, 1:]
                said = targets[targets != -100].to(tuned.device)
                nats, gradient = stored_gradient(tuned.detach(), self._stored_at(places), said)
            gradient.mul_(self._factors(places, factor, gradient))
            tuned.backward(gradient)  # type: ignore[no-untyped-call]
        return nats

    def _factors(self, places: Sequence[int], factor: float, gradient: Tensor) -> Tensor | float:
        """What multiplies the gradient of each token, (tokens, 1); one number where sequences count
        alike.
        """
        if self.weights is None:
            return factor
        each = [factor * self.weights[place] for place in places]
        counts = [count_scored([self.text[place]]) for place in places]
        spread = torch.tensor(each).repeat_interleave(torch.tensor(counts))
        return spread[:, None].to(gradient)

    def _stored_at(self, places: Sequence[int]) -> StoredBase:
        """What is stored of the base for all scored tokens of some sequences."""
        assert self.stored is not None
        bases = [self.stored[place] for place in places]
        names = [field.name for field in dataclasses.fields(StoredBase)]
        device = next(self.model.parameters()).device
        parts = [torch.cat([getattr(base, name) for base in bases]) for name in names]
        return StoredBase(*(part.to(device) for part in parts))

    def recent(self) -> float | None:
        """KL in nats per token over at least the last RECENT_SEQUENCES; None before the first."""
        tokens = sum(count for _, count in self.last)
        return sum(nats for nats, _ in self.last) / tokens if tokens else None

    def logs(self) -> dict[str, float]:
        """Mean KL in nats per token over the steps since the last call; empty before the first."""
        unlogged, self._unlogged = self._unlogged, []
        return {"kl": sum(unlogged) / len(unlogged)} if unlogged else {}


def matched_places(lengths: tuple[int, ...], sequences: int, turn: int, seed: int) -> list[int]:
    """The sequences of the turn-th step that sees any, by the lengths of all.

    All are gone through in an order drawn from the seed, then all in another, and so on; at the end
    of one the first of it are seen again where a step is not full. Within MATCHED_STEPS steps the
    same sequences are arranged so that those of a step have like lengths.
    """
    steps = -(-len(lengths) // sequences)  # in which all are seen
    pass_number, step = divmod(turn, steps)
    order = itertools.cycle(order_of_turn(len(lengths), seed, pass_number))
    drawn = list(itertools.islice(order, steps * sequences))
    group, at = divmod(step, MATCHED_STEPS)
    size = MATCHED_STEPS * sequences
    near = drawn[group * size : (group + 1) * size]
    near.sort(key=lambda place: (lengths[place], place))
    parts = [near[start : start + sequences] for start in range(0, len(near), sequences)]
    shuffled = random.Random(f"{seed} {pass_number} {group}").sample(parts, len(parts))
    return shuffled[at]


def kl_term(setup: Setup, model: nn.Module) -> KL | None:
    """The `KL` that the options ask for; None where its weight is 0."""
    o = setup.options
    assert o.kl_weight is not None and o.kl_sequences is not None
    if o.kl_weight == 0:
        return None
    text, stored = list(setup.text), setup.stored
    if o.kl_length is not None:
        text = [cut_after(piece, o.kl_length) for piece in text]
        stored = None if stored is None else [cut_stored(base, o.kl_length) for base in stored]
    return KL(
        model,
        text,
        weight=o.kl_weight,
        sequences=o.kl_sequences,
        every=o.kl_every or 1,
        seed=o.seed,
        pad_id=setup.tokenizer.pad_token_id,
        batch_size=o.batch_size,
        stored=stored,
        weights=sequence_weights(o.kl_kinds, setup.kinds),
    )


def cut_after(piece: Encoded, scored_tokens: int) -> Encoded:
    """A sequence up to its first so many predicted tokens."""
    ids, scored = piece
    predicted = [place for place in range(1, len(ids)) if scored[place]]
    end = predicted[:scored_tokens][-1] + 1
    return ids[:end], scored[:end]


def cut_stored(base: StoredBase, scored_tokens: int) -> StoredBase:
    """What is stored of the first so many predicted tokens."""
    parts = {field.name: getattr(base, field.name) for field in dataclasses.fields(StoredBase)}
    return StoredBase(**{name: part[:scored_tokens] for name, part in parts.items()})
