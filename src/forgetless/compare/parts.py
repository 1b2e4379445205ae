"""The parts of an experiment's data: texts and domains are carved into them once.

    DIR/data/general/NAME/record.jsonl, validation.jsonl, test.jsonl
    DIR/data/domain/NAME/train.jsonl, validation.jsonl, test.jsonl

Settings are chosen on the validation parts, and the test parts are used once. Near duplicates fall
into the same part, and the order of the rows does not matter (data/duplicates.py). Where an
experiment names files for both parts, nothing is carved: all of its rows stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.compare.experiment import Experiment
from forgetless.data.documents import Row, load_documents
from forgetless.data.domain import load_training_data
from forgetless.data.duplicates import carve
from forgetless.files.atomic import write_text

PARTS = ("validation", "test")
# Fractions of the rows for the training (or recorded) part, the validation part, and the test part
# where no test file is given: a fifth for each part that is measured.
WITH_TRAINING = {True: (0.8, 0.2), False: (0.6, 0.2, 0.2)}
# The same for a general text that is only measured.
MEASURED_ONLY = {True: (1.0,), False: (0.5, 0.5)}


def prepare(experiment: Experiment, out: Path) -> dict[str, str]:
    """Write the files of all parts:

    'general/NAME/record', 'general/NAME/test', 'domain/NAME/train', ... -> file.
    """
    files: dict[str, str] = {}
    for name, place in experiment.general.items():
        if experiment.own(name):  # what the model says itself is in no file
            continue
        own = "record" if name == experiment.recorded else None
        held = {part: _documents(place[part]) for part in PARTS if part in place}
        contents = _parts_of(f"general/{name}", own, _documents(place["text"]), held)
        files |= _written(out, f"general/{name}", contents)
    for name, place in experiment.domains.items():
        rows = list(load_training_data(place["data"]))
        held = {
            part: list(load_training_data(place[part], split=None))
            for part in PARTS
            if part in place
        }
        contents = _parts_of(f"domain/{name}", "train", rows, held)
        files |= _written(out, f"domain/{name}", contents)
    return files


def _documents(text: str) -> list[Row]:
    return [dataclasses.asdict(document) for document in load_documents(text)]


def _parts_of(
    name: str, own: str | None, rows: list[Row], held: Mapping[str, list[Row]]
) -> dict[str, list[Row]]:
    """The rows of each part: `own` is what is trained or recorded on, `held` what the experiment
    names files for.

    A given test part is put in an order that depends on its text alone.
    """
    first = (own,) if own else ()
    if "validation" in held:
        return {**dict.fromkeys(first, rows), **held}
    fractions = (WITH_TRAINING if own else MEASURED_ONLY)["test" in held]
    parts = (*first, *(PARTS[:1] if "test" in held else PARTS))
    carved = carve([_text_of(row) for row in rows], fractions)
    contents = {part: [rows[i] for i in chosen] for part, chosen in zip(parts, carved, strict=True)}
    if "test" in held:
        test = held["test"]
        contents["test"] = [test[i] for i in carve([_text_of(row) for row in test], (1.0,))[0]]
    for part, some in contents.items():
        if not some:
            raise ValueError(
                f"{name}: {len(rows)} rows leave none for the {part} part (near duplicates stay "
                "together); give more"
            )
    return contents


def _written(out: Path, name: str, contents: Mapping[str, list[Row]]) -> dict[str, str]:
    files = {}
    for part, rows in contents.items():
        path = out / "data" / name / f"{part}.jsonl"
        write_text(path, "".join(_line(row) for row in rows))
        files[f"{name}/{part}"] = str(path)
    return files


def _text_of(row: Mapping[str, Any]) -> str:
    return str(row.get("prompt") or row.get("text") or row.get("messages"))


def _line(row: Mapping[str, Any]) -> str:
    given = {key: value for key, value in row.items() if value is not None}
    return json.dumps(given, ensure_ascii=False) + "\n"
