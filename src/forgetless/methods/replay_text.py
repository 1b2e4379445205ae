"""The general text that methods read while tuning, --replay: from a file or data set, what the base
model says itself (`chat`, `self`), or the training rows (`domain`).

    replayed = replay_text(options, inputs.replay, base_model, tokenizer, rows)
    replayed.sequences, replayed.kinds     # token ids, and of what kind each is
    replayed.source.sequences              # how many there are; for run.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.data.documents import (
    Document,
    fingerprint_documents,
    fingerprint_rows,
)
from forgetless.data.encoding import Encoded, encode_pieces
from forgetless.data.own_text import KEPT, OWN_KINDS, own_text
from forgetless.data.selftext import as_documents, read_lines, write_lines
from forgetless.evaluate.own_answers import own_answers
from forgetless.files.atomic import atomic_path
from forgetless.files.run_json import ReplayedText
from forgetless.importance.kept_answers import KeptAnswers
from forgetless.model.loading import context_length
from forgetless.options.tune import TuneOptions

# What the model said itself, in the folder of the run: a resumed run reads it again.
OWN_TEXT = "self.jsonl"
# Answers that are replayed where --replay-documents does not say.
OWN_ANSWERS = 256


@dataclass(frozen=True)
class Replayed:
    """Sequences with something scored, the kind of prompt or the source of each, and where they
    came from, which is None without --replay.
    """

    sequences: list[Encoded]
    kinds: list[str]
    source: ReplayedText | None


def replay_text(
    options: TuneOptions,
    documents: list[Document] | None,
    model: nn.Module,
    tokenizer: Any,
    rows: Any,
    kept: KeptAnswers | None = None,
) -> Replayed:
    """The text of --replay: a text in pieces of at most --length tokens, whole answers of the
    model.

    `documents` are those of --replay where it names a text, `model` is the bare base, `rows` are
    the encoded training rows. Text that is sampled is written to DIR/self.jsonl, so that a resumed
    run sees the same. Raises ValueError where nothing is scored.
    """
    if options.replay is None:
        return Replayed([], [], None)
    if options.replay == "domain":
        pieces = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in rows]
        source = _source(options, pieces, fingerprint_rows(list(rows)))
        return Replayed(pieces, ["domain"] * len(pieces), source)
    length = min(options.length, context_length(model))
    if options.replay == KEPT:
        documents = _kept_documents(options, model, kept)
    if documents is None:
        documents = _own_documents(options, model, tokenizer)
    if options.replay in (*OWN_KINDS, KEPT):
        # An answer without its prompt would be another text, and what is kept is of whole answers.
        length = context_length(model)
    encoded = encode_pieces(documents, tokenizer, length=length)
    scored = [(piece, document) for piece, document in encoded if any(piece[1][1:])]
    if not scored:
        raise ValueError(
            f"--replay {options.replay}: no token of the text is scored; expected text, or chats "
            "with assistant turns"
        )
    pieces = [piece for piece, _ in scored]
    kinds = [document.source or "" for _, document in scored]
    return Replayed(pieces, kinds, _source(options, pieces, fingerprint_documents(documents)))


def _kept_documents(
    options: TuneOptions, model: nn.Module, kept: KeptAnswers | None
) -> list[Document]:
    """The answers that the importance file keeps.

    Raises ValueError where it keeps none, or those of another model.
    """
    if kept is None:
        raise ValueError(
            f"{options.importance} keeps no answers; record with --keep-answers 64, or give "
            "--replay chat"
        )
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(
        max(int(base.tokens.max()), *answer.ids)
        for base, answer in zip(kept.stored, kept.answers, strict=True)
    )
    longest = max(len(answer.ids) for answer in kept.answers)
    if largest >= words or longest > context_length(model):
        raise ValueError(
            f"the answers in {options.importance} are of another model: token {largest} and "
            f"{longest} tokens, found {words} tokens and a context of {context_length(model)}; "
            "record again"
        )
    return as_documents(kept.answers)


def _own_documents(options: TuneOptions, model: nn.Module, tokenizer: Any) -> list[Document]:
    """What the base model says itself to the prompts that are for recording.

    In a resumed run it is what was said before the run was interrupted.
    """
    wanted = own_text(options, options.replay)
    assert wanted is not None  # what is no text and not the domain is the model's own
    said = Path(options.out) / OWN_TEXT
    answers = read_lines(said) if options.resume else []
    if not answers:
        asked = replace(wanted, answers=options.replay_documents or OWN_ANSWERS)
        answers = own_answers(model, tokenizer, asked, "record")
        with atomic_path(said) as temporary:
            temporary.write_text(write_lines(answers), encoding="utf-8")
    return as_documents(answers)


def _source(options: TuneOptions, pieces: Sequence[Encoded], sha256: str) -> ReplayedText:
    """What run.json says of the text."""
    return ReplayedText(
        source=options.replay,
        sequences=len(pieces),
        tokens=sum(len(ids) for ids, _ in pieces),
        sha256=sha256,
    )
