"""Patterns from strangers: what PEFT will match against the names of layers, and how long it takes.

    check_patterns(config, where, names)      # FileError: the pattern '...' takes too long

A pattern with nested repeats can take longer than anybody waits, for a name of thirty letters. How
it looks does not tell: Unsloth writes patterns with ten repeats, which are quick. So patterns that
repeat more than a little are matched once against the names, by a process that can be stopped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from forgetless.errors import FileError, brief
from forgetless.files.untrusted import JsonObject

# Settings that PEFT matches against module names.
PATTERNS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "feedforward_modules",
)
# The most repeats in a pattern that is taken unmeasured: matching a name of n letters then takes up
# to n^4 steps.
MOST_REPEATS = 4
# The longest pattern, in letters. What Unsloth writes for a vision-language model has about 700.
LONGEST_PATTERN = 2000
# Seconds that matching all names may take. A quick pattern takes milliseconds for a thousand names,
# and the process that does it some tenths of a second to start.
LONGEST_MATCHING = 10.0
# What the process does: PEFT matches some patterns as they are, others behind a path.
MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (pattern, r"(.*\\.)?(" + pattern + ")$"):
        compiled = re.compile(form)
        for name in names:
            compiled.fullmatch(name)
            compiled.match(name)
"""
# Names that every model has, whose last letters no pattern foresees.
ENDINGS = ("", ".base_layer", "!")


def check_patterns(config: JsonObject, where: str, names: Iterable[str]) -> None:
    """Raise FileError for what is no regular expression, or takes too long to match with `names`
    of layers.
    """
    slow = []
    for key in PATTERNS:
        for pattern in _strings(config.get(key), f"{where}: {key}"):
            _check_form(pattern, f"{where}: {key}")
            if _may_be_slow(pattern):
                slow.append(pattern)
    if slow:
        _check_time(slow, [name + end for name in names for end in ENDINGS], where)


def _strings(value: Any, where: str) -> list[str]:
    """The patterns of a setting that is none, one, a list of them, or a mapping by them."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, dict)) and all(isinstance(name, str) for name in value):
        return list(value)
    raise FileError(f"{where}: expected names, found {brief(value)}")


def _check_form(pattern: str, where: str) -> None:
    """Raise FileError for what is no regular expression, or a very long one."""
    if len(pattern) > LONGEST_PATTERN:
        raise FileError(
            f"{where}: the pattern '{pattern[:80]}' has {len(pattern)} letters, expected at most "
            f"{LONGEST_PATTERN}: name the layers by their last parts"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FileError(
            f"{where}: '{pattern[:80]}' is not a regular expression ({error})"
        ) from None


def _may_be_slow(pattern: str) -> bool:
    """Whether a pattern repeats groups, or much."""
    repeats = len(re.findall(r"(?<!\\)[*+]|\{\d*,\d*\}", pattern))
    repeats_groups = re.search(r"(?<!\\)\)\s*[*+{]", pattern)
    return repeats > MOST_REPEATS or repeats_groups is not None


def _check_time(patterns: list[str], names: list[str], where: str) -> None:
    """Raise FileError where matching takes too long. The process reads nothing but its input."""
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCH],
            input=json.dumps([patterns, names]).encode(),
            timeout=LONGEST_MATCHING,
            check=True,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        raise FileError(
            f"{where}: matching the pattern '{patterns[0][:80]}' with {len(names)} names of layers "
            f"takes more than {LONGEST_MATCHING:.0f} s: it repeats what is repeated; name the "
            "layers by their last parts"
        ) from None
    except subprocess.CalledProcessError as error:
        raise FileError(
            f"{where}: the pattern '{patterns[0][:80]}' cannot be matched "
            f"({error.stderr.decode(errors='replace').strip().splitlines()[-1:]}); name the layers "
            "by their last parts"
        ) from None
