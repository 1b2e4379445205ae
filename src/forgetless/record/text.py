"""The general text that importance is recorded on: read or sampled, cut into pieces of tokens.

With `--calibrate` some of its documents are kept apart (kept_apart.py); importance is recorded on
the others.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.data.documents import Document, fingerprint_rows, load_documents
from forgetless.data.domain import document_texts
from forgetless.data.encoding import Encoded, encode_documents
from forgetless.data.own_text import own_text, read_text
from forgetless.data.selftext import as_documents
from forgetless.data.traces import traces_of
from forgetless.evaluate.own_answers import OWN_WORDS, default_kind, own_answers
from forgetless.importance.info import TextSource
from forgetless.importance.kept_answers import KeptAnswers, keep
from forgetless.model import distributed
from forgetless.model.loading import context_length
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.record import state as recording_state
from forgetless.record.kept_apart import apart
from forgetless.record.state import State

logger = logging.getLogger("forgetless")
# Tokens of a piece, where --length does not say otherwise; never more than the model's context.
PIECE_LENGTH = 1024


@dataclass(frozen=True)
class RecordingText:
    """Text to record on; `source` is None where the estimator needs no text."""

    pieces: list[Encoded]
    source: TextSource | None
    kept_apart: list[Document] = dataclasses.field(default_factory=list)  # for a calibration

    def hash_of_kept_apart(self) -> str:
        """sha256 of the documents kept apart."""
        return hash_of(self.kept_apart)


def hash_of(documents: list[Document]) -> str:
    """sha256 over the content of some documents."""
    return fingerprint_rows([dataclasses.asdict(document) for document in documents])


def general_text(options: RecordOptions, model: nn.Module, tokenizer: Any) -> RecordingText:
    """The text that `options` name, in pieces, and what is kept apart of it for a calibration.

    Raises ValueError and OptionError where it cannot be read or is too short.
    """
    if ESTIMATORS[options.estimator].constant:
        return RecordingText([], None)
    longest = context_length(model)
    documents = _usable_documents(options, model, tokenizer)
    kept_apart: list[Document] = []
    if options.calibrate:
        documents, kept_apart = apart(documents, tokenizer)
    documents = documents[: options.documents]
    length = min(options.length or PIECE_LENGTH, longest)
    pieces = encode_documents(documents, tokenizer, length=length)
    source = TextSource(
        source=options.general,
        documents=len(documents),
        tokens=sum(len(ids) for ids, _ in pieces),
        sha256=hash_of(documents),
        traces=traces_of(document_texts(documents)).plain(),
    )
    return RecordingText(pieces, source, kept_apart)


def with_general(options: RecordOptions, tokenizer: Any) -> RecordOptions:
    """The options with what to record on, where they do not say: what the model says itself."""
    if options.general or ESTIMATORS[options.estimator].constant:
        return options
    kind = default_kind(tokenizer)
    logger.info("recording on %s; --general TEXT records on a text of yours", OWN_WORDS[kind])
    return dataclasses.replace(options, general=kind)


def _usable_documents(options: RecordOptions, model: nn.Module, tokenizer: Any) -> list[Document]:
    """All documents that may be used, before any are kept apart: the model's own, then those of a
    text.
    """
    documents: list[Document] = []
    if wanted := own_text(options, options.general):
        documents += as_documents(own_answers(model, tokenizer, wanted, "record"))
    if text := read_text(options.general):
        documents += load_documents(
            text,
            column=options.text_column,
            split=options.general_split,
            limit=None if options.calibrate else options.documents,
        )
    return documents


def kept_answers(options: RecordOptions, model: nn.Module, tokenizer: Any) -> KeptAnswers:
    """The first of the answers that are recorded on, to be kept in the file, by the bare base."""
    wanted = own_text(options, options.general)
    assert wanted is not None  # check_record_options has seen to it
    answers = own_answers(model, tokenizer, wanted, "record")
    return keep(model, answers[: options.keep_answers])


def check_text(options: RecordOptions, source: TextSource, state: State | None) -> None:
    """Raise ValueError where the text is not that of the saved state, or not the same in every
    process.
    """
    if state is not None:
        recording_state.check_same_text(options, state, source.sha256)
    if len(set(distributed.collect(source.sha256))) > 1:
        raise ValueError(
            f"--general {options.general} gave the processes different text; give a file "
            "instead, the same for all"
        )
