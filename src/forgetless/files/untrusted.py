"""Files from strangers: what every reader of them shares.

Standard library only (and PyYAML when a file is read).

    printable(text)          one line for a terminal: control characters, line ends and signs that
                             reorder text are written as escapes
    cleaned(data)            the same for every string of plain data; line ends and tabs stay
    FileError                a file that cannot be used; its message is one printable line, whatever
                             the file holds
    load_json, load_yaml     plain data, nested at most DEPTH levels, whole numbers of at most 64
                             bits; YAML without tags, at most NODES values however often aliases
                             repeat them
    check_name               a name that may become part of a path: no separators, no '..', no
                             control characters

Costs: one pass over what was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from forgetless.errors import UNSAFE, UNSAFE_IN_TEXT, FileError, brief

DEPTH = 40  # levels of lists and mappings; an experiment has five
NODES = 100_000  # values in a YAML file
YAML_BYTES = 1 << 20


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
        data = json.loads(text, parse_int=_whole)
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


def _whole(digits: str) -> int | float:
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


def load_yaml(text: str) -> Any:
    """The plain data in YAML text.

    Raises ValueError with the line: no YAML, tags, too deep, too many values, control characters.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader with limits that hold while nodes are composed, before anything is made of
        them.
        """

        depth, sizes = 0, {}  # type: ignore[var-annotated] # id of a finished node -> values in it, repeated ones counted again

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            refuse = lambda why: yaml.composer.ComposerError(None, None, why, event.start_mark)
            if isinstance(event, yaml.AliasEvent):
                node = super().compose_node(parent, index)
                if id(node) not in self.sizes:
                    raise refuse("an alias stands inside of what it names")
                return node
            if event.tag is not None and event.tag != "!":
                raise refuse("found a tag ('!...'), expected plain values")
            self.depth += 1
            if self.depth > DEPTH:
                raise refuse(f"nested deeper than {DEPTH} levels")
            node = super().compose_node(parent, index)
            self.depth -= 1
            assert node is not None
            children = node.value if not isinstance(node.value, str) else []
            parts = [
                part
                for child in children
                for part in (child if isinstance(child, tuple) else (child,))
            ]
            self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in parts)
            if self.sizes[id(node)] > NODES:
                raise refuse(f"more than {NODES} values, with what aliases repeat")
            if isinstance(node.value, str) and UNSAFE_IN_TEXT.search(node.value):
                raise refuse("found a control character")
            return node

    def whole(loader: Any, node: Any) -> Any:
        found = loader.construct_yaml_int(node) if len(node.value) < 100 else 1 << 64
        if not abs(found) < 1 << 63:
            raise yaml.constructor.ConstructorError(
                None, None, "found a whole number of more than 64 bits", node.start_mark
            )
        return found

    Loader.add_constructor("tag:yaml.org,2002:int", whole)
    if len(text) > YAML_BYTES:
        raise ValueError(f"expected at most {YAML_BYTES} characters, found {len(text)}")
    Loader.sizes = {}
    try:
        data = yaml.load(text, Loader)  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"{line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or number that has the form of one alone
        raise ValueError(str(error).splitlines()[0]) from None
    return data


def check_mapping(value: Any, what: str, known: Collection[str] | None = None) -> dict[str, Any]:
    """`value` as a mapping with text as keys, empty for None. Raises FileError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FileError(
            f"{what}: expected a mapping, found "
            f"{brief(value) if not isinstance(value, Mapping) else 'keys that are no text'}"
        )
    if known is not None and (unknown := sorted(set(value) - set(known))):
        raise FileError(f"{what}: unknown key '{unknown[0]}'; known: {', '.join(known)}")
    return dict(value)
