"""Documents of general text that the training data also holds: word for word, or nearly, found by runs of words (shingles).

A rise measured on such documents says nothing of what was lost. Near duplicates: at least half of a document's runs of 8 words occur in the training data.
Memory: one 32-bit hash per run of words, of which at most about 5 million are kept (those that a power of two divides), so that any size fits.

    overlap(general, training).describe()     # None where there is none
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORDS = 8
SHARE = 0.5
MOST = 5_000_000


@dataclass(frozen=True)
class Overlap:
    """Indices of general documents that the training data holds word for word, and nearly."""

    exact: list[int]
    near: list[int]
    documents: int

    def describe(self) -> str | None:
        """For people; None where nothing overlaps."""
        if not self.exact and not self.near:
            return None
        first = (self.exact or self.near)[0] + 1
        return (f"the general text overlaps the training data: {len(self.exact)} of {self.documents} documents are in it word for word and {len(self.near)} "
                f"nearly (first: document {first}); what is measured on them says nothing of forgetting. Use other general text, or remove them")  # fmt: skip


def overlap(general: Sequence[str], training: Sequence[str]) -> Overlap:
    """Which documents of `general` occur in `training`, ignoring case and white space."""
    words = [_words(text) for text in training]
    every = 1
    while sum(map(len, words)) / every > MOST:
        every *= 2
    whole = {" ".join(row) for row in words}
    known = {shingle for row in words for shingle in _shingles(row, every)}
    exact, near = [], []
    for index, text in enumerate(general):
        mine = _words(text)
        runs = set(_shingles(mine, every))
        if " ".join(mine) in whole:
            exact.append(index)
        elif runs and len(runs & known) >= SHARE * len(runs):
            near.append(index)
    return Overlap(exact, near, len(general))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _shingles(words: list[str], every: int) -> Iterator[int]:
    for start in range(len(words) - WORDS + 1):
        value = zlib.crc32(" ".join(words[start : start + WORDS]).encode())
        if value % every == 0:
            yield value
