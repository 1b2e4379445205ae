"""Files from strangers: what every reader of them shares. Standard library only.

    load_json(text)          plain data, nested at most DEPTH levels, whole numbers of at most 64
                             bits (for YAML: untrusted_yaml.py)
    cleaned(data)            every string of plain data as no terminal obeys it: control characters
                             and signs that reorder text are written as escapes; line ends and tabs
                             stay
    check_name(name)         a name that may become part of a path: no separators, no '..', no
                             control characters
    check_mapping(value)     a mapping with text as keys

What cannot be used is a FileError (errors.py), whose message is one printable line, whatever the
file holds. The checks cost one pass over what was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from forgetless.errors import UNSAFE, UNSAFE_IN_TEXT, FileError, brief

# Plain data by name, whose keys and values other people choose: users, the Hub, other libraries.
JsonObject = dict[str, Any]
# Levels of lists and mappings that a file may nest; an experiment has five.
DEPTH = 40


def cleaned(data: Any) -> Any:
    """Plain data with every string, keys too, free of control characters but line ends and tabs."""
    if isinstance(data, str):
        return UNSAFE_IN_TEXT.sub(
            lambda match: match[0].encode("unicode_escape").decode("ascii"), data
        )
    if isinstance(data, Mapping):
        return {cleaned(key): cleaned(value) for key, value in data.items()}
    return [cleaned(value) for value in data] if isinstance(data, list) else data


def check_name(name: Any, what: str) -> str:
    """`name` where it may become part of a file's name and of a line on a terminal. Raises
    FileError.
    """
    if not isinstance(name, str):
        raise FileError(f"{what}: expected a name, found {brief(name)}; put it in quotes")
    if (
        not name
        or len(name) > 100
        or name.startswith(".")
        or name != name.strip()
        or UNSAFE.search(name)
        or re.search(r'[/\\:*?"<>|]', name)
    ):
        raise FileError(
            f"{what}: {name!r} cannot be a name: expected 1 to 100 characters, none of them a "
            "control character or one of "
            "/ \\ : * ? \" < > |, without a leading '.' or spaces at the ends"
        )
    return name


def load_json(text: str) -> Any:
    """The plain data in JSON text.

    Raises ValueError: no JSON, nested too deep, half a surrogate pair. Numbers beyond 64 bits come
    as floats.
    """
    try:
        data = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(data)
    if "\\ud" in text.lower():
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half a surrogate pair, which is no text") from None
    return data


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for value in level
            if isinstance(value, (list, dict))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEPTH} levels")


def check_mapping(value: Any, what: str, known: Collection[str] | None = None) -> JsonObject:
    """`value` as a mapping with text as keys, empty for None. Raises FileError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise FileError(f"{what}: expected a mapping, found {brief(value)}")
    if not all(isinstance(key, str) for key in value):
        raise FileError(f"{what}: expected a mapping, found keys that are no text")
    if known is not None and (unknown := sorted(set(value) - set(known))):
        raise FileError(f"{what}: unknown key '{unknown[0]}'; known: {', '.join(known)}")
    return dict(value)
