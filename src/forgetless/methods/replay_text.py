"""The general text that methods read while tuning, --replay: from a file or data set, sampled from
the base model (`self`), or the training rows (`domain`).

    pieces, source = replay_text(options, inputs.replay, base_model, tokenizer, rows)
    source.sequences          # how many there are; for run.json
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.data.documents import (
    Document,
    fingerprint_documents,
    fingerprint_rows,
    load_documents,
)
from forgetless.data.encoding import Encoded, encode_documents, sample_documents
from forgetless.files.atomic import atomic_path
from forgetless.files.run_json import ReplayedText
from forgetless.model.loading import context_length
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")
# Documents to sample from the model where --replay-documents does not say how many.
SELF_DOCUMENTS = 256
# Tokens that such a document has at most.
SELF_LENGTH = 256


def replay_text(
    options: TuneOptions,
    documents: list[Document] | None,
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
) -> tuple[list[Encoded], ReplayedText | None]:
    """(Sequences of at most --length tokens with something scored, where they came from).

    `documents` are those of --replay where it names a text, `model` is the bare base, `rows` are
    the encoded training rows. ([], None) without --replay. Text that is sampled is written to
    DIR/self.jsonl, so that a resumed run sees the same. Raises ValueError where nothing is scored.
    """
    if options.replay is None:
        return [], None
    if options.replay == "domain":
        pieces = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in rows]
        return pieces, _source(options, pieces, fingerprint_rows(list(rows)))
    length = min(options.length, context_length(model))
    if documents is None:
        documents = _self_documents(options, model, tokenizer, min(length, SELF_LENGTH))
    encoded = encode_documents(documents, tokenizer, length=length)
    pieces = [(ids, scored) for ids, scored in encoded if any(scored[1:])]
    if not pieces:
        raise ValueError(
            f"--replay {options.replay}: no token of the text is scored; expected text, or chats "
            "with assistant turns"
        )
    return pieces, _source(options, pieces, fingerprint_documents(documents))


def _self_documents(
    options: TuneOptions, model: nn.Module, tokenizer: Any, length: int
) -> list[Document]:
    """Documents of at most `length` tokens that the base model says.

    In a resumed run they are those that it said before the run was interrupted.
    """
    sampled = Path(options.out) / "self.jsonl"
    if options.resume and sampled.is_file():
        return [Document(document.text, None, "self") for document in load_documents(str(sampled))]
    count = options.replay_documents or SELF_DOCUMENTS
    logger.info(
        "sampling %d documents of at most %d tokens from the base model for --replay self",
        count,
        length,
    )
    documents = sample_documents(model, tokenizer, count, length, options.seed)
    with atomic_path(sampled) as temporary:
        temporary.write_text(
            "".join(json.dumps({"text": document.text}) + "\n" for document in documents),
            encoding="utf-8",
        )
    return documents


def _source(options: TuneOptions, pieces: Sequence[Encoded], sha256: str) -> ReplayedText:
    """What run.json says of the text."""
    return ReplayedText(
        source=options.replay,
        sequences=len(pieces),
        tokens=sum(len(ids) for ids, _ in pieces),
        sha256=sha256,
    )
