"""How an option is described, checked and read from YAML.

    learning_rate: float = option(None, "AdamW learning rate", group="training", above=0)
    checked(field, "1e-3")           # 0.001; raises OptionError for what does not fit
    length: int = same(RecordOptions, "length")   # the row that `record` has
    deciding(TuneOptions, RUNNING)   # ("device", "threads", ...)

The row of an option is the only place that says what the option is: its help, its bounds, where
`--help` shows it, and whether the result of a run depends on it. The other files of options/ hold
the rows. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from forgetless.errors import FileError, OptionError, brief, nearest
from forgetless.files.untrusted import JsonObject
from forgetless.files.untrusted_yaml import load_yaml

# Options by name with their values, as a command line, a file, a preset or a method gives them.
Given = Mapping[str, Any]
# What an option decides. An interrupted run may go on, and the command on a card may leave out what
# is not part of the result.
RESULT = "result"  # the result itself
MEASURED = "measured"  # only what the result is measured on (`record`: the text that it reads)
RUNNING = "running"  # only where and how the work runs, what is watched, and where files go
# The headings of --help, in their order.
GROUPS = (
    "model",
    "data",
    "importance",
    "adapter",
    "method",
    "holding",
    "budget",
    "sequence",
    "training",
    "measuring",
    "output",
)


def option(
    default: Any,
    help: str,
    *,
    group: str,
    choices: Collection[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    decides: str = RESULT,
    later: bool = False,
    positional: bool = False,
    metavar: str | None = None,
    repeated: bool = False,
    reads: bool = False,
    nothing: str | None = None,
) -> Any:
    """A dataclass field with all that is to be known about an option.

    `group` is one of GROUPS, `decides` one of RESULT, MEASURED and RUNNING; `at_least`, `above` and
    `below` are bounds of a number. `later`: the option came after the first comparisons, so the
    address of a run holds it only where it was given (compare/experiment.py). `repeated`: it may be
    given several times; the values are joined by commas. `reads`: the value names what is read, or
    several with commas, which may lie on this machine and must not be written over. `nothing` is
    the word that asks for None where something else is taken by default.
    """
    assert group in GROUPS and decides in (RESULT, MEASURED, RUNNING)
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "below": below,
        "decides": decides,
        "later": later,
        "positional": positional,
        "metavar": metavar,
        "repeated": repeated,
        "reads": reads,
        "nothing": nothing,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def same(kind: Any, name: str) -> Any:
    """The field of an option that another verb has too, with the same row."""
    spec = kind.__dataclass_fields__[name]
    return field(default=spec.default, metadata=spec.metadata)


def deciding(kind: Any, what: str) -> tuple[str, ...]:
    """The names of the options of a dataclass that decide `what`."""
    return tuple(f.name for f in dataclasses.fields(kind) if f.metadata["decides"] == what)


def checked(spec: dataclasses.Field, value: Any) -> Any:
    """`value` if it fits the option's type, choices and bounds.

    It is converted where YAML is known to be loose: 1e-3 is a string there.
    """
    if value is None or str(spec.type) == "Any":
        return value
    value = _converted(spec, value)
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        near = nearest(str(value), choices)
        raise OptionError(
            f"{flag(spec.name)} expects one of {', '.join(choices)}, found '{value}'"
            + (f"; {near}" if near.startswith("did") else "")
        )
    at_least, above, below = (spec.metadata[name] for name in ("at_least", "above", "below"))
    if at_least is not None and value < at_least:
        raise OptionError(f"{flag(spec.name)} must be at least {at_least}, found {value}")
    if above is not None and value <= above:
        raise OptionError(f"{flag(spec.name)} must be above {above}, found {value}")
    if below is not None and value >= below:
        raise OptionError(f"{flag(spec.name)} must be below {below}, found {value}")
    return value


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def _converted(spec: dataclasses.Field, value: Any) -> Any:
    """`value` in the type of the option. Raises OptionError where it is of another."""
    kind = str(spec.type).split(" ")[0]
    try:
        if kind == "bool":
            if not isinstance(value, bool):
                raise ValueError
            return value
        if kind == "int":
            whole = not isinstance(value, bool) and int(value) == float(value)
            if not whole or not abs(int(value)) < 1 << 63:
                raise ValueError
            return int(value)
        if kind == "float":
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        if isinstance(value, (dict, set, bytes)):
            raise ValueError
        return ",".join(value) if isinstance(value, (list, tuple)) else str(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{flag(spec.name)} expects {kind}, found {brief(value)}") from None


def several(spec: str | None) -> list[str]:
    """The values of an option that may be given several times.

    Commas divide them, but not in the name of a file or folder that is there, as a value or behind
    the name of a task (sciq=a,b.jsonl).
    """
    if not spec:
        return []
    if "," not in spec or os.path.exists(spec):
        return [spec]
    parts = spec.split(",")
    values = []
    while parts:
        tried = (n for n in range(len(parts), 1, -1) if _is_there(",".join(parts[:n])))
        count = next(tried, 1)
        values.append(",".join(parts[:count]).strip())
        parts = parts[count:]
    return [value for value in values if value]


def _is_there(value: str) -> bool:
    """Whether a value, or what stands behind its name, is a file or folder of this machine."""
    name, _, behind = value.strip().partition("=")
    places = (value.strip(), "" if "," in name else behind)
    return any(place and os.path.exists(os.path.expanduser(place)) for place in places)


def read_yaml(path: str | Path) -> JsonObject:
    """The mapping in a YAML file, safe-loaded; keys may be written with - or _.

    Raises OptionError with the line of a syntax error, FileError where there is no such file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FileError(f"configuration file '{path}' does not exist")
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise OptionError(f"configuration file '{path}' is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise OptionError(
            f"configuration file '{path}' must hold a mapping of options, found "
            f"{type(content).__name__}"
        )
    return {key.replace("-", "_"): value for key, value in content.items()}


def as_dict(options: Any) -> JsonObject:
    """Options as plain values, for run.json and the resolved configuration."""
    return dataclasses.asdict(options)


def parse_rule(rule: str) -> tuple[float, float]:
    """'sum' -> (1, 1), 'decay:0.9' -> (0.9, 0.1), 'none' -> (1, 0): factors of the importance so
    far and of that of the last domain (importance/consolidate.py). Raises OptionError.
    """
    if rule in ("sum", "none"):
        return 1.0, float(rule == "sum")
    match = re.fullmatch(r"decay:(0?\.\d+)", rule)
    if match is None or not 0 < float(match.group(1)) < 1:
        raise OptionError(
            "--consolidate expects sum, none, or decay:0.9 with a number between 0 and 1, found "
            f"'{rule}'"
        )
    return float(match.group(1)), 1 - float(match.group(1))
