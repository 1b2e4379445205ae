"""Documents with the base model's loss on each, so that a model can be paired with the base again
and again while the base is measured once.

    part = pair_with(base, encoded, sources, window)      # costs one evaluation
    part.rise(tuned, error=0.05)                          # costs one more
    part.some([0, 3]).losses(tuned)                       # of two documents alone

Windows do not overlap: half the cost of `forgetless eval`, whose windows move by half of one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.documents import Document, TokenDocument
from forgetless.data.encoding import Encoded, encode_document
from forgetless.evaluate.losses import text_loss
from forgetless.evaluate.rise import Rise, paired_rise


@dataclass(frozen=True)
class PairedText:
    """Encoded documents with the base model's loss on each: `nats` and `tokens`, (documents,).

    `sources` says where each document comes from, for the interval of a rise.
    """

    encoded: list[Encoded]
    sources: list[str]
    nats: np.ndarray
    tokens: np.ndarray
    window: int

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def mean_length(self) -> float:
        """Tokens of a document that is read from its first token on, on average."""
        return float(self.tokens.mean()) + 1

    def losses(self, model: nn.Module) -> np.ndarray:
        """Summed loss of each document now, in nats. Costs one evaluation."""
        return text_loss(
            model, self.encoded, window=self.window, stride=self.window - 1, label="general text"
        ).nats_by_document

    def rise(self, model: nn.Module, *, error: float) -> Rise:
        """How much more `model` loses than the base, with its interval."""
        return paired_rise(self.nats, self.losses(model), self.tokens, self.sources, error=error)

    def rise_without_interval(self, losses: np.ndarray) -> float:
        """How much more than the base the documents lose at `losses`, (documents,), in nats per
        token.
        """
        return float((losses - self.nats).sum() / self.tokens.sum())

    def some(self, chosen: Sequence[int]) -> PairedText:
        """Some of the documents."""
        at = list(chosen)
        return replace(
            self,
            encoded=[self.encoded[i] for i in at],
            sources=[self.sources[i] for i in at],
            nats=self.nats[at],
            tokens=self.tokens[at],
        )


def pair_with(
    model: nn.Module, encoded: list[Encoded], sources: list[str], window: int
) -> PairedText:
    """A part with the losses that `model` has now."""
    loss = text_loss(model, encoded, window=window, stride=window - 1, label="general text")
    return PairedText(encoded, sources, loss.nats_by_document, loss.tokens_by_document, window)


def encoded_each(
    documents: Sequence[Document], tokenizer: Any
) -> tuple[list[Encoded], list[Document]]:
    """The documents with something to predict, each as token ids with what is scored."""
    encoded, with_targets = [], []
    for document in documents:
        ids, scored = encode_document(document, tokenizer)
        if any(scored[1:]):
            encoded.append((ids, scored))
            with_targets.append(document)
    return encoded, with_targets


def content(document: Document) -> str:
    """The text of a document, all of its turns, or its tokens."""
    if isinstance(document, TokenDocument):
        return str(document.ids)
    if document.text is not None:
        return document.text
    return json.dumps(document.messages, ensure_ascii=False)
