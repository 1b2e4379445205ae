"""Errors that a user can see, and how text from strangers is shown in them.

    FileError        a file that cannot be used
    OptionError      a wrong option or a wrong combination of options: exit code 2
    nearest          the known name closest to a mistyped one, for the end of a message
    printable        any text as one line that no terminal obeys
    brief            a value as it is shown in a message

The message of every error is one printable line, since it may quote what stands in a file.
Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

# Characters of a message.
LONGEST_MESSAGE = 1000
# Control characters, lone surrogates, line separators, and what reorders text on a terminal
# ("Trojan Source").
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# The same, but for line ends and tabs.
UNSAFE_IN_TEXT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class FileError(ValueError):
    """A file that cannot be used."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OptionError(FileError):
    """A wrong option or a wrong combination of options, wherever it was given."""


def printable(text: Any, longest: int = LONGEST_MESSAGE) -> str:
    """`text` as one line that no terminal obeys, shortened in its middle."""
    escape = lambda match: match[0].encode("unicode_escape").decode("ascii")
    line = UNSAFE.sub(escape, str(text))
    if len(line) <= longest:
        return line
    return f"{line[: longest // 2]} ... {line[-(longest // 2) :]}"


def brief(value: Any) -> str:
    """A value in an error message: its type, and the value itself where it is short."""
    shown = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else ""
    return shown if 0 < len(shown) <= 80 else type(value).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the known name closest to `name`, or all where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
