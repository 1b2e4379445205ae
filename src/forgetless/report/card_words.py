"""What the cards of importance files and of tuned models say alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from forgetless.files.hub import hub_name

# What stands between two lines of `---` at the top of a card, with the keys that the Hub knows.
FrontMatter = dict[str, Any]


def dataset_name(source: Any) -> str | None:
    """The Hub data set in a source ('owner/name', 'owner/name:config'); None for files, tasks and
    sampled text.
    """
    name = hub_name(str(source or "").partition(":")[0])
    return name if name and "/" in name else None


def one_line(value: Any) -> str:
    """Text on one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(value)).strip()


def code(value: Any) -> str:
    """Text as code in a line of markdown, whatever is in it."""
    text = one_line(value) or "-"
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def versions_in_words(versions: Mapping[str, object]) -> str:
    """'forgetless 0.2.0, torch 2.13.0'."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
