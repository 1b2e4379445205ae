"""JSON files as dataclasses: checked when they are read, written with their keys in order.

    @dataclass(frozen=True)
    class Change:
        nats: float | None = None
        standard_error: float | None = None

    read_record("change.json", Change)  # FileError: change.json.nats: expected a number, found 'x'
    from_json(data, Change, "change")   # the same for data at hand
    write_record("change.json", Change(0.1))  # {"nats": 0.1, "standard_error": null}

The annotations of a class say what its file may hold:

    str                a name: text alone
    Text               text, or a number or truth value that is shown as text
    int, float         a number that is finite, as is its square
    Level              a number from 0 to 1
    bool               true or false
    list[X]            a list; null may stand in it only as `X | None`
    dict[str, X]       a mapping with any keys
    a dataclass        a mapping with the fields as keys
    Any                anything

A key that is missing or null is the default of its field; a field without a default must be there.
Keys that no field has are let through, since nothing reads them.

A field whose key has another name than it, or that is not always written, says so:

    level: Level = field(metadata=key("share"))
    error: str | None = field(default=None, metadata=LEFT_OUT)     # not written where it is None
    numbers: dict[str, float] = field(metadata=REST)     # every key that no other field has

A class whose keys or their order depend on its values has a method `keys` that lists them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from forgetless.errors import FileError, brief
from forgetless.files.atomic import json_ready, read_json, write_json
from forgetless.files.untrusted import JsonObject, cleaned

# What general text is called where it stands beside the domains that were learned.
GENERAL = "general text"
# The end of every message about a file that does not fit.
DAMAGED = "the file is damaged, or of another version of forgetless"
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """A plain value: what it is called in an error, and the test that it passes."""

    called: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a number whose square is finite; a truth value and NaN are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e100


Text = Annotated[
    str | float | bool, Kind("text", lambda value: isinstance(value, (str, int, float, bool)))
]
Level = Annotated[
    float, Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
]
# The plain types of Python as they may stand in a file.
PLAIN = {
    str: Kind("a name", lambda value: isinstance(value, str)),
    int: Kind("a number", is_number),
    float: Kind("a number", is_number),
    bool: Kind("true or false", lambda value: isinstance(value, bool)),
    Any: Kind("anything", lambda value: True),
}
# Marks a field that is not written where it has its default.
LEFT_OUT = {"left_out": True}
# Marks the field that takes every key which no other field has.
REST = {"rest": True}


def key(name: str) -> dict[str, str]:
    """The metadata of a field whose key in the file is `name`."""
    return {"key": name}


def read_record(path: str | Path, kind: type[T]) -> T:
    """A JSON file as a dataclass, its text without control characters.

    Raises FileError with the file, the place in it, what was expected and what was found.
    """
    return from_json(read_plain(path), kind, str(path))


def read_plain(path: str | Path) -> Any:
    """The data in a JSON file, its text without control characters. Raises FileError."""
    return cleaned(read_json(path))


def write_record(path: str | Path, value: Any) -> None:
    """Write a dataclass as a JSON file, whole or not at all."""
    write_json(path, to_json(value))


def from_json(data: Any, kind: type[T], where: str) -> T:
    """Plain data as an instance of `kind`.

    Raises FileError that names the first place, below `where`, which does not fit.
    """
    reading: Callable[[Any], T] = _reading(kind)  # type: ignore[arg-type]  # hashable, if not said
    try:
        return reading(data)
    except _DoesNotFit as error:
        raise FileError(f"{where}{error.place}: {error.why}; {DAMAGED}") from None


def as_record(data: Any, kind: type[T]) -> T:
    """What would be read from a file if `data`, plain or a dataclass, were written to it; a number
    that is too large for a reader is missing, as that of a training that diverged.
    """
    return from_json(_without_giants(json_ready(to_json(data))), kind, kind.__name__)


def _without_giants(data: Any) -> Any:
    """Plain data with null for each number whose square is not finite."""
    if isinstance(data, dict):
        return {name: _without_giants(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_without_giants(value) for value in data]
    giant = isinstance(data, (int, float)) and not isinstance(data, bool) and not is_number(data)
    return None if giant else data


def to_json(value: Any) -> Any:
    """Plain data for a JSON file: dataclasses become mappings, all through lists and mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_of(value)
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def plain_of(record: Any) -> JsonObject:
    """A dataclass as the mapping that its file holds."""
    return dict(_keys_and_values(record))


def _keys_and_values(value: Any) -> Iterator[tuple[str, Any]]:
    """The keys of a dataclass with their plain values, in the order of the file."""
    fields = {name: each for name, each, _ in _fields(value.__class__)}
    for name in value.keys() if hasattr(value, "keys") else fields:
        inner = getattr(value, fields[name].name)
        if fields[name].metadata.get("rest"):
            yield from to_json(inner).items()
        elif not (fields[name].metadata.get("left_out") and inner == _default(fields[name])):
            yield name, to_json(inner)


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, dataclasses.Field[Any], Any], ...]:
    """(key in the file, field, annotation) of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (each.metadata.get("key", each.name), each, hints[each.name])
        for each in dataclasses.fields(kind)
    )


def _default(each: dataclasses.Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


class _DoesNotFit(Exception):
    """What is wrong with a value; each list or mapping around it adds its part of the place."""

    def __init__(self, why: str) -> None:
        self.why = why
        self.place = ""

    def within(self, part: str) -> _DoesNotFit:
        self.place = part + self.place
        return self


@functools.cache
def _reading(kind: Any) -> Callable[[Any], Any]:
    """A function: plain data -> what the annotation `kind` says. It raises _DoesNotFit."""
    if dataclasses.is_dataclass(kind):
        return lambda data: _record(_of_type(data, dict), kind)
    if get_origin(kind) is list:
        entry = _nullable(*get_args(kind))
        return lambda data: _list(_of_type(data, list), entry)
    if get_origin(kind) is dict:
        entry = _nullable(get_args(kind)[1])
        return lambda data: _mapping(_of_type(data, dict), entry)
    plain = next(iter(getattr(kind, "__metadata__", ())), None) or PLAIN[kind]
    return lambda data: _leaf(data, plain)


def _leaf(data: Any, kind: Kind) -> Any:
    if not kind.fits(data):
        raise _DoesNotFit(f"expected {kind.called}, found {brief(data)}")
    return data


def _list(data: list[Any], entry: Callable[[Any], Any]) -> list[Any]:
    values = []
    for number, value in enumerate(data):
        try:
            values.append(entry(value))
        except _DoesNotFit as error:
            raise error.within(f"[{number}]") from None
    return values


def _mapping(data: JsonObject, entry: Callable[[Any], Any]) -> JsonObject:
    values = {}
    for name, value in data.items():
        try:
            values[name] = entry(value)
        except _DoesNotFit as error:
            raise error.within(f".{name}") from None
    return values


def _record(data: JsonObject, kind: Any) -> Any:
    """A mapping as a dataclass."""
    values: JsonObject = {}
    for name, each, hint in _fields(kind):
        if each.metadata.get("rest"):
            others = {known for known, _, _ in _fields(kind)}
            rest = {other: inner for other, inner in data.items() if other not in others}
            values[each.name] = _reading(hint)(rest)
        elif data.get(name) is not None:
            try:
                values[each.name] = _reading(_without_none(hint))(data[name])
            except _DoesNotFit as error:
                raise error.within(f".{name}") from None
        elif _default(each) is MISSING:
            raise _DoesNotFit(f"'{name}' is missing")
    return kind(**values)


def _of_type(data: Any, kind: type) -> Any:
    if not isinstance(data, kind):
        called = "list" if kind is list else "mapping"
        raise _DoesNotFit(f"expected a {called}, found {brief(data)}")
    return data


def _nullable(kind: Any) -> Callable[[Any], Any]:
    """A function for an entry of a list or mapping, which may be null where `kind` says so."""
    inner = _reading(_without_none(kind))
    if _without_none(kind) is kind:
        return inner
    return lambda data: None if data is None else inner(data)


def _without_none(kind: Any) -> Any:
    """X for the annotation `X | None`, and every other annotation as it is."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    (inner,) = (each for each in get_args(kind) if each is not types.NoneType)
    return inner
