"""General documents kept apart for a calibration: importance is not recorded on them.

At most a third of the general documents are kept apart, chosen by the hash of their text. About
half of their tokens are trained on, in three pieces, and the rest is measured on. Where all of them
are answers of the base itself, what is measured is the divergence from it, else the loss:

    recorded, kept = apart(documents, tokenizer)
    pieces, measured_on = divided(base, tokenizer, kept)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.documents import Document, TokenDocument
from forgetless.data.encoding import Encoded
from forgetless.data.selftext import Answer
from forgetless.errors import OptionError
from forgetless.evaluate.paired import PairedText, content, encoded_each, pair_with
from forgetless.evaluate.paired_answers import PairedAnswers, paired_answers
from forgetless.evaluate.rise import FEW_DOCUMENTS
from forgetless.model.loading import context_length

# At most this fraction of the general documents is kept apart: importance needs most of them.
FRACTION = 1 / 3
# At most about so many tokens are kept apart: enough for three pieces of 4, 8 and 16 thousand.
TOKENS = 58_000
# At least so many documents are kept apart: half of them are measured on, enough for an interval.
LEAST_DOCUMENTS = 2 * FEW_DOCUMENTS
# At least so many tokens are kept apart.
LEAST_TOKENS = 4_000
# Tokens of a document that count; what a long one has beyond them is not used.
CUT = TOKENS // (2 * LEAST_DOCUMENTS)
# Sizes of the three pieces that are trained on, relative to each other: narrower and wider domains.
PIECES = (1, 2, 4)
# Tokens of a window in which a loss is measured, at most.
WINDOW = 2048


def apart(documents: Sequence[Document], tokenizer: Any) -> tuple[list[Document], list[Document]]:
    """(documents to record on, documents kept apart), by the hash of their text.

    Raises OptionError where there are too few.
    """
    by_text = {content(document): document for document in documents}
    ordered = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())
    tokens: dict[str, int] = {}  # of each document kept apart
    for text in ordered[: int(FRACTION * len(ordered))]:
        if sum(tokens.values()) >= TOKENS:
            break
        # A document in which there is nothing to predict is left out by encoded_each.
        for ids, scored in encoded_each([by_text[text]], tokenizer)[0]:
            if any(scored[1:CUT]):
                tokens[text] = min(CUT, len(ids))
    if len(tokens) < LEAST_DOCUMENTS or sum(tokens.values()) < LEAST_TOKENS:
        raise OptionError(
            "--calibrate keeps a third of the general documents apart, to train and to measure "
            f"on: expected at least {LEAST_DOCUMENTS} there, "
            f"different ones of {LEAST_TOKENS:,} tokens together, found {len(tokens)} of "
            f"{sum(tokens.values()):,}; give more general text (of the model's own answers, a "
            "larger --answers), or leave out --calibrate"
        )
    recorded = [document for document in documents if content(document) not in tokens]
    return recorded, [by_text[text] for text in tokens]


def divided(
    base: nn.Module, tokenizer: Any, kept: Sequence[Document]
) -> tuple[list[list[Encoded]], PairedText | PairedAnswers]:
    """(three pieces of text to train on; the part to measure on, with what the base makes of it).

    Documents stay whole, but for what is cut from long ones. About half of the tokens are trained
    on, and at least ten documents measured.
    """
    encoded, documents = encoded_each(kept, tokenizer)
    encoded = [(ids[:CUT], scored[:CUT]) for ids, scored in encoded]
    edges = _edges([len(ids) for ids, _ in encoded])
    pieces = [encoded[first:last] for first, last in itertools.pairwise(edges)]
    measured = documents[edges[-1] :]
    said = [document for document in measured if isinstance(document, TokenDocument)]
    if len(said) == len(measured):
        return pieces, paired_answers(base, [_answer(document) for document in said])
    sources = [document.source for document in measured]
    window = min(WINDOW, context_length(base))
    return pieces, pair_with(base, encoded[edges[-1] :], sources, window)


def _answer(document: TokenDocument) -> Answer:
    """What the base said itself, to measure a divergence on."""
    ids = document.ids[:CUT]
    return Answer(prompt="", kind=document.source, ids=ids, start=document.start, ended=False)


def _edges(lengths: Sequence[int]) -> list[int]:
    """Where the pieces begin, and where the last one ends, among documents of these lengths."""
    ends = np.cumsum(lengths) / sum(lengths)
    wanted = np.cumsum((0, *PIECES)) / (2 * sum(PIECES))
    edges = [int(edge) for edge in np.searchsorted(ends, wanted)]
    for place in range(1, len(edges)):  # each piece has a document of its own,
        edges[place] = max(edges[place], edges[place - 1] + 1)
    for place in range(1, len(edges)):  # and enough are left to measure on
        after = len(edges) - 1 - place
        edges[place] = min(edges[place], len(lengths) - FEW_DOCUMENTS - after)
    return edges
