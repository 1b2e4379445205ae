"""YAML from strangers: plain values alone, within limits that hold while they are read, before
anything is made of them.

    load_yaml("a: [1, 2]")      # {"a": [1, 2]}

Tags are refused, and so are more than DEPTH levels and more than NODES values, counted as often as
aliases repeat them. Reading costs one pass over the text.
"""

from __future__ import annotations

from typing import Any

import yaml

from forgetless.errors import UNSAFE_IN_TEXT
from forgetless.files.untrusted import DEPTH

# Values in a file, counted as often as aliases repeat them; an experiment has some hundred.
NODES = 100_000
# Characters of a file.
YAML_CHARACTERS = 1 << 20
# Digits of a whole number that are read at all: Python takes long over many more.
DIGITS = 100


def load_yaml(text: str) -> Any:
    """The plain data in YAML text.

    Raises ValueError with the line: no YAML, tags, too deep, too many values, control characters.
    """
    if len(text) > YAML_CHARACTERS:
        raise ValueError(f"expected at most {YAML_CHARACTERS} characters, found {len(text)}")
    try:
        return yaml.load(text, PlainLoader)  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"{line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or number that has the form of one alone
        raise ValueError(str(error).splitlines()[0]) from None


class PlainLoader(yaml.SafeLoader):
    """PyYAML's loader of plain data, with limits on the nodes that a text is composed of."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # values in each finished node, repeated ones counted again

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node. Raises ComposerError where it is more than plain data."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _refused(event, "an alias stands inside of what it names")
            return node
        if event.tag is not None and event.tag != "!":
            raise _refused(event, "found a tag ('!...'), expected plain values")
        self.depth += 1
        if self.depth > DEPTH:
            raise _refused(event, f"nested deeper than {DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        assert node is not None
        self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in _inner_nodes(node))
        if self.sizes[id(node)] > NODES:
            raise _refused(event, f"more than {NODES} values, with what aliases repeat")
        if isinstance(node.value, str) and UNSAFE_IN_TEXT.search(node.value):
            raise _refused(event, "found a control character")
        return node


def _refused(event: Any, why: str) -> yaml.composer.ComposerError:
    return yaml.composer.ComposerError(None, None, why, event.start_mark)


def _inner_nodes(node: yaml.Node) -> list[yaml.Node]:
    """The entries of a list, the keys and values of a mapping; nothing in a plain value."""
    if isinstance(node.value, str):
        return []
    nodes: list[yaml.Node] = []
    for child in node.value:
        nodes.extend(child if isinstance(child, tuple) else (child,))
    return nodes


def _whole_number(loader: Any, node: Any) -> Any:
    number = loader.construct_yaml_int(node) if len(node.value) < DIGITS else 1 << 64
    if not abs(number) < 1 << 63:
        raise yaml.constructor.ConstructorError(
            None, None, "found a whole number of more than 64 bits", node.start_mark
        )
    return number


PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
