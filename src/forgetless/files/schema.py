"""What compare.json and run.json may hold, as far as it is read: one table that a file is checked
against before anything is made of it.

    check(data, COMPARISON, "compare.json")       # raises FileError: compare.json:
                                                  runs[3].points[0].scale: expected a number, found
                                                  'x'
    read_checked(path, TRIAL)                     # a JSON file, checked, without control characters

A shape is a kind (TEXT, NUMBER, ...), [shape] for a list, {"key": shape} for a mapping with these
keys, or Each(shape) for one with any keys. Missing keys and null fit everywhere but at keys marked
with "!"; keys that are not named are let through, since nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.errors import FileError, brief
from forgetless.files.atomic import read_json
from forgetless.files.untrusted import cleaned

GENERAL = "general text"
DAMAGED = "the file is damaged, or of another version of forgetless"


@dataclass(frozen=True)
class Kind:
    """A plain value: what it is called, and the test that it passes."""

    called: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A mapping of which every value has a shape."""

    shape: Any


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e100
    )  # its square is finite; NaN is not


TEXT = Kind("text", lambda value: isinstance(value, (str, int, float, bool)))
NAME = Kind("a name", lambda value: isinstance(value, str))
NUMBER = Kind("a number", _number)
SHARE = Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
ANY = Kind("anything", lambda value: True)
LOSS = dict.fromkeys(
    ("nats", "standard_error", "perplexity", "documents", "tokens", "bits_per_byte"), NUMBER
)
CHANGE = {"nats": NUMBER, "standard_error": NUMBER}
SCORE = dict.fromkeys(("before", "after", "standard_error", "questions"), NUMBER)
POINT = {
    "scale": NUMBER,
    "learning": CHANGE,
    "forgetting": Each(CHANGE),
    "accuracy": SCORE,
    "accuracy_general": Each(SCORE),
}
LOG = [Each(ANY)]
MOVED = [
    {
        "weight": TEXT,
        "layer": NUMBER,
        "kind": TEXT,
        "movement": NUMBER,
        "importance": NUMBER,
        "coefficient": NUMBER,
    }
]
ENVIRONMENT = {
    "python": TEXT,
    "platform": TEXT,
    "versions": Each(TEXT),
    "device": TEXT,
    "commit": TEXT,
}
COSTS = dict.fromkeys(
    (
        "energy",
        "seconds",
        "wall_seconds",
        "peak_memory_bytes",
        "file_bytes",
        "trainable_parameters",
    ),
    NUMBER,
)
TRIAL: dict[str, Any] = {
    "id": TEXT,
    "method!": NAME,
    "domain": TEXT,
    "part": TEXT,
    "seed": NUMBER,
    "settings": Each(ANY),
    "chosen": ANY,
    "status": TEXT,
    "error": TEXT,
    "points": [POINT],
    "extra_data": TEXT,
    "log": LOG,
    "moved": MOVED,
    **COSTS,
}
NUMBERS = ("scale", "learning", "learning_error", "forgetting", "forgetting_error", "seeds")
PLACE = {"run": TEXT, "on_frontier": ANY, **dict.fromkeys(NUMBERS, NUMBER)}
FRONTIER = {"points": [PLACE], "area": NUMBER, "area_error": NUMBER}
EQUAL = {
    "method!": NAME,
    "share!": SHARE,
    "status": TEXT,
    **dict.fromkeys(("learning_nats", "forgetting", "standard_error", "reached", "seeds"), NUMBER),
}
DIFFERENCE = {
    "domain": TEXT,
    "text": TEXT,
    "share": NUMBER,
    "a": TEXT,
    "b": TEXT,
    "difference": NUMBER,
    "standard_error": NUMBER,
    "ratio": NUMBER,
    "beyond_noise": TRUTH,
}
NOISE = {"learning": NUMBER, "forgetting": Each(NUMBER), "how": TEXT}
WEIGHT = {"name": TEXT, "layer": NUMBER, "kind": TEXT, "norm": NUMBER, "coefficient": NUMBER}
TRANSFER = dict.fromkeys(("average", "backward_transfer", "forward_transfer"), NUMBER)
SEQUENCE = {
    "name": TEXT,
    "method": TEXT,
    "seed": NUMBER,
    "domains": [TEXT],
    "general": Each([NUMBER]),
    "rows": [TEXT],
    "matrix": [[NUMBER]],
    "accuracy": [[NUMBER]],
    "accuracy_transfer": TRANSFER,
    **TRANSFER,
}
INTERVAL = dict.fromkeys(("nats", "standard_error", "low", "high", "documents"), NUMBER)
BOUGHT = {"way": TEXT, "share": NUMBER, "mu": NUMBER, "learning": NUMBER}
BUDGET = {
    "budget": TEXT,
    "budget_nats": NUMBER,
    "verdict": TEXT,
    "way": TEXT,
    "share": NUMBER,
    "mu": NUMBER,
    "promised": NUMBER,
    "check": INTERVAL,
    "predicted": dict.fromkeys(("nats", "bound"), NUMBER),
    "learning": CHANGE,
    "others": Each(BOUGHT),
    "curve": [{**BOUGHT, "rise": INTERVAL, "bound": NUMBER}],
    "trajectory": [dict.fromkeys(("step", "probe", "rise", "strength"), NUMBER)],
}
COMPARISON = {
    "kind": TEXT,
    "title": TEXT,
    "model": TEXT,
    "reference": NAME,
    "created": NAME,
    "environment": ENVIRONMENT,
    "settings": Each(ANY),
    "progress": {"done": NUMBER, "of": NUMBER, "failed": NUMBER, "seconds": NUMBER},
    "texts": [
        {
            "name!": NAME,
            "kind": TEXT,
            "documents": NUMBER,
            "tokens": NUMBER,
            "before": {**LOSS, "accuracy": NUMBER},
        }
    ],
    "domains": [
        {
            "name!": NAME,
            "rows": NUMBER,
            "rows_trained": NUMBER,
            "before": {**LOSS, "accuracy": NUMBER},
        }
    ],
    "methods": [{"name!": NAME, "label": TEXT, "family": TEXT, "needs": TEXT, "trials": NUMBER}],
    "runs": [TRIAL],
    "frontier": Each(Each(Each(FRONTIER))),
    "equal_learning": Each(Each([EQUAL])),
    "noise": Each(NOISE),
    "differences": [DIFFERENCE],
    "verdict": [TEXT],
    "samples": [{"domain": TEXT, "prompt": TEXT, "reference": TEXT, "outputs": Each(TEXT)}],
    "sequences": [SEQUENCE],
    "notes": [TEXT],
    "budget": BUDGET,
    "importance": [
        {
            "name": TEXT,
            "estimator": TEXT,
            "tier": TEXT,
            "bytes": NUMBER,
            "seconds": NUMBER,
            "tokens": NUMBER,
            "weights": [WEIGHT],
        }
    ],
    "measures": [
        {"name": TEXT, "unit": TEXT, "before": NUMBER, "after": NUMBER, "standard_error": NUMBER}
    ],
}
SCORES = {
    "answer_loss": LOSS,
    **dict.fromkeys(("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"), NUMBER),
}
STATE = {"general": LOSS, "domain": LOSS, "tasks": Each(SCORES)}
RUN = {
    "configuration": Each(ANY),
    "environment": ENVIRONMENT,
    "data": Each(ANY),
    "method": [NAME],
    "before": STATE,
    "after": STATE,
    "forgetting": CHANGE,
    "learning": CHANGE,
    "budget": BUDGET,
    "energy": NUMBER,
    "train_seconds": NUMBER,
    "trainable_parameters": NUMBER,
    "peak_memory_bytes": NUMBER,
    "log": LOG,
    "moved": MOVED,
    "sequence": {
        "domains!": [NAME],
        "matrix!": [[NUMBER]],
        "accuracy_domains!": [NAME],
        "accuracy": [[NUMBER]],
        "general": [CHANGE],
        "accuracy_transfer": TRANSFER,
        **TRANSFER,
    },
}


def check(data: Any, shape: Any, where: str) -> None:
    """Raise FileError naming the first place where `data` does not have `shape`."""
    if isinstance(shape, Kind):
        if not shape.fits(data):
            raise FileError(f"{where}: expected {shape.called}, found {brief(data)}; {DAMAGED}")
        return
    kind = list if isinstance(shape, list) else dict
    if not isinstance(data, kind):
        raise FileError(
            f"{where}: expected a {'list' if kind is list else 'mapping'}, found {brief(data)}; "
            "the file is damaged, or of another version of forgetless"
        )
    if isinstance(shape, list):
        for index, value in enumerate(data):
            _check_inner(value, shape[0], f"{where}[{index}]")
        return
    assert isinstance(data, dict)
    inner = dict.fromkeys(data, shape.shape) if isinstance(shape, Each) else shape
    for marked, one in inner.items():
        key = marked.removesuffix("!") if not isinstance(shape, Each) else marked
        if data.get(key) is not None:
            check(data[key], one, f"{where}.{key}")
        elif key != marked:
            raise FileError(f"{where}: '{key}' is missing; {DAMAGED}")


def _check_inner(value: Any, shape: Any, where: str) -> None:
    """Values in a list: numbers may be null, all else may not."""
    if value is not None or shape is not NUMBER:
        check(value, shape, where)


def read_checked(path: str | Path, shape: Any) -> Any:
    """A JSON file of this shape, its text without control characters. Raises FileError."""
    data = cleaned(read_json(path))
    check(data, shape, str(path))
    return data
