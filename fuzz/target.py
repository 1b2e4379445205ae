"""What a kind of file is to the fuzzer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """`seeds`: name -> bytes of a valid file; `change`: a mutation; `use`: reads a file of that
    name and yields the lines it would show.
    """

    seeds: dict[str, bytes]
    change: Callable[[str, bytes, random.Random], bytes]
    use: Callable[[Path], list[str]]
    rare: tuple[str, ...] = ()  # seeds that take long: in one case of fifty of their share
