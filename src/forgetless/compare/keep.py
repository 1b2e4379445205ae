"""What must not be lost at a step of a sequence, as a text for methods that replay: the recorded
general text, from the second step on with the training rows of the domains before, well mixed.

    text_to_keep(experiment, files, ["medicine"], Path("keep-2.jsonl"), replayed=True)

Where the general text is what the base says itself, its conversations stand beside those rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from forgetless.compare.experiment import Experiment
from forgetless.compare.own import text_of_record
from forgetless.data.documents import Row, load_documents
from forgetless.data.domain import load_training_data, row_text
from forgetless.data.own_text import SELF, OwnText
from forgetless.evaluate.own_answers import chosen_prompts, own_answers
from forgetless.files.atomic import write_text
from forgetless.model.loading import load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve


def text_to_keep(
    experiment: Experiment,
    files: Mapping[str, str],
    earlier: Sequence[str],
    path: Path,
    *,
    replayed: bool,
) -> str:
    """The text, which is written to `path` where there are `earlier` domains.

    Unless it is `replayed`, what the base says itself is not sampled for it.
    """
    general = text_of_record(experiment, files)
    own = experiment.own(experiment.recorded)
    if not earlier or (own and not replayed):
        return general
    if own is None:
        rows: list[Row] = [dataclasses.asdict(document) for document in load_documents(general)]
    else:
        rows = _said_rows(experiment, own)
    for domain in earlier:
        rows += list(load_training_data(files[f"domain/{domain}/train"]))
    if not all(row.get("messages") for row in rows):
        rows = [{"text": row_text(row)} for row in rows]
    lines = []
    for row in rows:
        given = {key: value for key, value in row.items() if value is not None}
        lines.append(json.dumps(given, ensure_ascii=False))
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    write_text(path, "\n".join(lines) + "\n")
    return str(path)


def _said_rows(experiment: Experiment, own: OwnText) -> list[Row]:
    """What the base says itself, as chats; of a base model, as texts."""
    options = resolve(ModelOptions, experiment.model)
    tokenizer = load_tokenizer(options)
    answers = own_answers(load_to_train(options), tokenizer, own, "record")
    said = [tokenizer.decode(answer.scored, skip_special_tokens=True) for answer in answers]
    if own.kind == SELF:
        return [{"text": text} for text in said]
    prompts = {prompt.id: prompt for prompt in chosen_prompts(own, tokenizer, "record")}
    return [
        {"messages": [*prompts[answer.prompt].messages, {"role": "assistant", "content": text}]}
        for answer, text in zip(answers, said, strict=True)
    ]
