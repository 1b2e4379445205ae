"""The base model's own answers, so that its divergence from a model can be measured again and again
while the base is read once.

    part = paired_answers(base, answers)            # costs one evaluation, and 0.5 KiB a token
    part.rise(tuned, error=0.05)                    # the divergence with its interval
    part.some([0, 3]).losses(tuned)                 # of two answers alone

It stands where a PairedText (paired.py) stands for a general text: what a text has lost more than
with the base, an answer has in divergence from it. Where the base lies under an adapter the
divergence is exact, and costs two evaluations; else it is by what was stored of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.own_text import OwnText
from forgetless.data.selftext import Answer
from forgetless.evaluate.divergence import StoredBase, divergence, stored_base
from forgetless.evaluate.losses import TextLoss
from forgetless.evaluate.own_answers import own_answers
from forgetless.evaluate.rise import FEW_DOCUMENTS, Rise, paired_rise
from forgetless.files.behaviours_json import KindDivergence
from forgetless.files.measured_json import Divergence
from forgetless.model.adapters import has_adapter


@dataclass(frozen=True)
class PairedAnswers:
    """Answers of the base with what was stored of it; `tokens` are those that it said, (answers,).

    `under_adapter`: a model with an adapter has the same base under it, so that it can be asked.
    """

    answers: list[Answer]
    stored: list[StoredBase]
    tokens: np.ndarray
    under_adapter: bool = True

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def mean_length(self) -> float:
        """Tokens of an answer with its prompt, on average."""
        return float(np.mean([len(answer.ids) for answer in self.answers]))

    @property
    def nats(self) -> np.ndarray:
        """The base's divergence from itself, (answers,)."""
        return np.zeros(len(self.answers))

    def losses(self, model: nn.Module) -> np.ndarray:
        """Divergence of `model` summed over each answer, in nats: (answers,)."""
        base = None if self.under_adapter and has_adapter(model) else self.stored
        return divergence(base, model, self.answers)[0]

    def rise(self, model: nn.Module, *, error: float) -> Rise:
        """The divergence of `model` in nats per token, with its interval over answers."""
        one_source = [""] * len(self.answers)
        return paired_rise(self.nats, self.losses(model), self.tokens, one_source, error=error)

    def rise_without_interval(self, losses: np.ndarray) -> float:
        """The divergence in nats per token, from that of each answer, (answers,)."""
        return float(losses.sum() / self.tokens.sum())

    def measured(self, model: nn.Module | None) -> Divergence:
        """The divergence of `model`, as a file has it; of None, of the bare base itself."""
        losses = self.nats if model is None else self.losses(model)
        loss = TextLoss(losses, self.tokens).record()
        kinds = [answer.kind for answer in self.answers]
        return Divergence(**{**vars(loss), "perplexity": None}, kind_by_document=kinds)

    def by_stored(self) -> PairedAnswers:
        """The same answers, measured by what is stored of the base alone."""
        return replace(self, under_adapter=False)

    def some(self, chosen: Sequence[int]) -> PairedAnswers:
        """Some of the answers."""
        at = list(chosen)
        return replace(
            self,
            answers=[self.answers[i] for i in at],
            stored=[self.stored[i] for i in at],
            tokens=self.tokens[at],
        )


def divergence_by_kind(own: Divergence | None) -> list[KindDivergence] | None:
    """The divergence of the answers to each kind of prompt, the largest first; None where it was
    not measured, or on answers of one kind.
    """
    if own is None or own.kind_by_document is None or len(set(own.kind_by_document)) < 2:
        return None
    whole = TextLoss.of(own)
    kinds = np.array(own.kind_by_document)
    rows = []
    for kind in sorted(set(own.kind_by_document)):
        at = kinds == kind
        loss = TextLoss(whole.nats_by_document[at], whole.tokens_by_document[at])
        rows.append(KindDivergence(kind, loss.nats, loss.standard_error, int(at.sum())))
    return sorted(rows, key=lambda row: -(row.nats or 0.0))


def paired_part(
    base: nn.Module, tokenizer: Any, own: OwnText | None, part: str, *, sampling: bool = True
) -> PairedAnswers | None:
    """One part of what the bare base says itself; None where it is not asked for.

    Raises ValueError for fewer answers than an interval needs.
    """
    if own is None:
        return None
    answers = own_answers(base, tokenizer, own, part, sampling=sampling)
    return enough_answers(paired_answers(base, answers), part)


def enough_answers(paired: PairedAnswers, part: str) -> PairedAnswers:
    """The answers. Raises ValueError for fewer than an interval needs."""
    if len(paired) < FEW_DOCUMENTS:
        raise ValueError(
            f"the {part} part of what the model says itself has {len(paired)} answers with "
            f"something said, expected at least {FEW_DOCUMENTS}; give a larger --answers"
        )
    return paired


def paired_answers(base: nn.Module, answers: Sequence[Answer]) -> PairedAnswers:
    """The answers with what `base` makes of them now; an answer of nothing is left out."""
    said = [answer for answer in answers if answer.scored]
    tokens = np.array([len(answer.scored) for answer in said], float)
    return PairedAnswers(said, stored_base(base, said), tokens)
