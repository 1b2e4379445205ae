"""The card of an importance file: where it came from, and how to use it."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forgetless.files.hub import hub_name, shareable
from forgetless.report import numbers
from forgetless.report.card_words import (
    FrontMatter,
    code,
    dataset_name,
    one_line,
    versions_in_words,
)
from forgetless.report.markdown import plain

# A bar that would end a cell of a table, also inside code.
PIPE = re.compile(r"(?<!\\)\|")
# What the card says of a file without a calibration.
NOT_CALIBRATED = "none: a forgetting budget needs general text while tuning"
# What an importance file is, for whoever meets one for the first time.
ABOUT = """\
How much each weight of the base model matters to general text: fine-tune with it, and the model \
keeps what it knew. Made by
[forgetless](https://arxiv.org/abs/2501.13669); it belongs to the base weights, so it serves any \
LoRA rank, any data and full fine-tuning. It holds no weights."""
# How an importance file is used.
USE = """\
## Use

```sh
forgetless tune {model} --data domain.jsonl --importance {repo} --out run
```

```python
import forgetless

importance = forgetless.Importance.from_pretrained({name!r})
forgetless.hold(trainer, importance)  # any transformers or TRL trainer
trainer.train()
```"""


def importance_card(
    info: Mapping[str, Any],
    *,
    tier: str,
    weights: int,
    elements: int,
    size: int,
    calibration: str | None = None,
    repo: str | None = None,
) -> tuple[FrontMatter, str]:
    """(front matter, section) of an importance file; `info` is the file's own, `size` its bytes,
    `calibration` what it says of itself, `repo` where it will be.
    """
    info = shareable(info)
    model = info.get("model", {})
    dataset = dataset_name(info.get("data", {}).get("source"))
    front = {
        "base_model": hub_name(model.get("name")),
        "library_name": "forgetless",
        "tags": ["forgetless", "importance", "continual-learning", "catastrophic-forgetting"],
        "datasets": [dataset] if dataset else None,
    }
    stored = f"{weights} weights with {elements:,} elements in {numbers.byte_size(size)}"
    rows = [
        *_origin(info),
        ("tier", f"{code(tier)}: {stored}"),
        ("error of the tier", _tier_error(info)),
        ("calibration", plain(calibration or NOT_CALIBRATED)),
        ("general text", _general_text(info.get("data", {}))),
        ("recorded with", _recorded_with(info)),
    ]
    cells = ((key, PIPE.sub(r"\\|", value)) for key, value in rows)
    name = one_line(model.get("name", "MODEL"))
    place = repo or "FOLDER"
    use = USE.format(model=shlex.quote(name), repo=shlex.quote(place), name=place)
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)]
    return front, "\n".join([f"# Importance of {plain(name)}", "", ABOUT, "", *table, "", use])


def _origin(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was recorded, and of which model."""
    model = info.get("model", {})
    base = code(model.get("name", "?"))
    if model.get("revision"):
        base += f", revision {code(model['revision'])}"
    settings = plain(one_line(numbers.settings(info.get("settings"))))
    yield "base model", base
    yield "fingerprint of its weights", code(str(model.get("fingerprint", "?"))[:16])
    yield "estimator", f"{code(info.get('estimator', '?'))}, settings {settings}"
    yield "unit", plain(one_line(info.get("unit", "?")))


def _general_text(data: Mapping[str, Any]) -> str:
    return (
        f"{code(data.get('source', '?'))}: {numbers.integer(data.get('documents'))} documents, "
        f"{numbers.integer(data.get('tokens'))} tokens, "
        f"sha256 {code(str(data.get('sha256', '?'))[:16])}"
    )


def _recorded_with(info: Mapping[str, Any]) -> str:
    versions = info.get("versions", {}).get("versions") or {}
    return plain(one_line(versions_in_words(versions)))


def _tier_error(info: Mapping[str, Any]) -> str:
    """What the tier did to the energy, where the file says it."""
    stored = info.get("energy_error", {})
    pairs = [pair for pair in stored.get("weights", {}).values() if len(pair) == 2]
    if not pairs:
        return "none: the form it was recorded in"
    random, evading = zip(*pairs, strict=True)
    return plain(
        f"energy per weight against {stored.get('against', '?')}: of a random update "
        f"{_spread(random)}; of one that evades importance {_spread(evading)}"
    )


def _spread(errors: Sequence[float]) -> str:
    return f"median {100 * statistics.median(errors):.2g} %, largest {100 * max(errors):.2g} %"
