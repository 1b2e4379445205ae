"""How an option is described, checked and read from YAML; what options there are is in verbs.py.

    learning_rate: float = option(None, "peak learning rate; default: preset")     # a dataclass
        field that knows its help
    checked(field, "1e-3")                                                         # 0.001;
        OptionError for what does not fit

Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import field
from pathlib import Path
from typing import Any

from forgetless.errors import OptionError, brief, nearest
from forgetless.files.untrusted import load_yaml


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    positional: bool = False,
    metavar: str | None = None,
    repeated: bool = False,
) -> Any:
    """A dataclass field with what the command line needs to know about it.

    `repeated`: may be given several times; the values are joined by commas.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "positional": positional,
        "metavar": metavar,
        "repeated": repeated,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# Options that must be at least a number, and those that must be above zero, wherever they occur.
AT_LEAST = {
    "rank": 1,
    "batch_size": 1,
    "accumulation": 1,
    "save_steps": 1,
    "log_steps": 1,
    "limit": 1,
    "documents": 1,
    "self_documents": 1,
    "threads": 1,
    "final_rank": 1,
    "length": 2,
    "stride": 1,
    "batch_tokens": 1,
    "shots": 0,
    "eval_steps": 0,
    "strength": 0,
    "cov_rank": 0,
    "groups": 1,
    "dropout": 0,
    "warmup": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "replay_documents": 1,
    "replay_share": 0,
    "kl_weight": 0,
    "kl_sequences": 1,
    "general_steps": 0,
    "scale": 0,
    "max_forgetting": 0,
    "orthogonality": 0,
    "jobs": 1,
    "mu": 0,
    "tokens": 2,
    "general_tokens": 1,
    "record_tokens": 2,
    "processes": 1,
}
ABOVE_ZERO = ("learning_rate", "epochs", "alpha", "xi", "flops")


def checked(spec: dataclasses.Field, value: Any) -> Any:
    """`value` if it fits the field's annotation and choices, converted where YAML is known to be
    loose (1e-3 is a string there).
    """
    kind = str(spec.type)
    if value is None or kind == "Any":
        return value
    flag = "--" + spec.name.replace("_", "-")
    try:
        if kind.startswith("bool"):
            if not isinstance(value, bool):
                raise ValueError
        elif kind.startswith("int"):
            if (
                isinstance(value, bool)
                or int(value) != float(value)
                or not abs(int(value)) < 1 << 63
            ):
                raise ValueError
            value = int(value)
        elif kind.startswith("float"):
            if isinstance(value, bool) or not math.isfinite(float(value)):
                raise ValueError
            value = float(value)
        else:
            if isinstance(value, (dict, set, bytes)):
                raise ValueError
            value = ",".join(value) if isinstance(value, (list, tuple)) else str(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{flag} expects {kind.split(' ')[0]}, found {brief(value)}") from None
    choices = spec.metadata.get("choices")
    if choices and value not in choices:
        near = nearest(str(value), choices)
        raise OptionError(
            f"{flag} expects one of {', '.join(choices)}, found '{value}'"
            + (f"; {near}" if near.startswith("did") else "")
        )
    if spec.name in AT_LEAST and value < AT_LEAST[spec.name]:
        raise OptionError(f"{flag} must be at least {AT_LEAST[spec.name]}, found {value}")
    if spec.name in ABOVE_ZERO and value <= 0:
        raise OptionError(f"{flag} must be above 0, found {value}")
    if spec.name == "dropout" and value >= 1:
        raise OptionError(f"{flag} must be below 1, found {value}")
    return value


def several(spec: str | None) -> list[str]:
    """The parts of an option that may be given several times; a file whose name has commas is one
    part.
    """
    if not spec:
        return []
    return (
        [spec]
        if "," not in spec or Path(spec).exists()
        else [part.strip() for part in spec.split(",") if part.strip()]
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, safe-loaded; keys may be written with - or _.

    Raises OptionError with the line of a syntax error.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise OptionError(f"configuration file '{path}' does not exist")
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OptionError:
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


def as_dict(options: Any) -> dict[str, Any]:
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
