"""The base's own answers in a file, so that a later check measures on the same ones and asks the
base nothing.

    write_answers(path, options, base, paired)        # answers.json
    stored = read_given(path)                       # before a model is loaded
    paired = paired_again(stored, path, base)         # what the base makes of them now

The file holds token ids and the fingerprint of the base's weights: answers of another base would
not be what this one says, and their divergence would not be what it loses.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from forgetless.data.selftext import Answer
from forgetless.errors import FileError
from forgetless.evaluate.paired_answers import PairedAnswers, enough_answers, paired_answers
from forgetless.files.gate_json import ANSWERS_FORMAT, StoredAnswer, StoredAnswers
from forgetless.files.schema import read_record, write_record
from forgetless.model.fingerprint import exact_fingerprint
from forgetless.model.loading import context_length


def write_answers(path: str | Path, model: str, weights: str, paired: PairedAnswers) -> None:
    """Keep the answers of the base called `model`, whose fingerprint is `weights`."""
    answers = [
        StoredAnswer(each.prompt, each.kind, list(each.ids), each.start, each.ended)
        for each in paired.answers
    ]
    write_record(path, StoredAnswers(ANSWERS_FORMAT, model, weights, answers))


def read_given(path: str | Path) -> StoredAnswers:
    """The answers in a file. Raises FileError for what is no such file."""
    stored = read_record(path, StoredAnswers)
    if stored.format != ANSWERS_FORMAT:
        raise FileError(
            f"{path}: expected format {ANSWERS_FORMAT}, found {stored.format}; let this version of "
            "forgetless check write it again"
        )
    for number, answer in enumerate(stored.answers):
        if not 0 < answer.start <= len(answer.ids):
            raise FileError(
                f"{path}: answer {number} begins at token {answer.start} of {len(answer.ids)}, "
                "expected one of them; the file is damaged"
            )
    return stored


def paired_again(stored: StoredAnswers, path: str | Path, base: nn.Module) -> PairedAnswers:
    """The answers with what the base makes of them.

    Raises FileError where another base gave them.
    """
    if stored.weights != exact_fingerprint(base):
        raise FileError(
            f"{path} has the answers of another base ('{stored.model}', with other weights or in "
            "another dtype); let forgetless check write it again without --own-answers"
        )
    answers = [
        Answer(each.prompt, each.kind, tuple(each.ids), each.start, each.ended)
        for each in stored.answers
    ]
    words = next(base.get_input_embeddings().parameters()).shape[0]  # type: ignore[operator]
    for number, answer in enumerate(answers):
        if not all(0 <= token < words for token in answer.ids):
            raise FileError(
                f"{path}: answer {number} is not of the {words} tokens of this model; the file is "
                "damaged"
            )
    longest = max((len(answer.ids) for answer in answers), default=0)
    if longest > context_length(base):
        raise FileError(
            f"{path}: the longest answer has {longest} tokens with its prompt, more than the "
            f"{context_length(base)} of the model's context; the file is damaged"
        )
    return enough_answers(paired_answers(base, answers), "check")
