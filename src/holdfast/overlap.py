"""Documents of general text that the training data also holds: word for word, or nearly, found by runs of words (shingles).

A rise measured on such documents says nothing of what was lost. Near duplicates: at least half of a document's runs of 8 words occur in the training data.
In writing without spaces (Chinese, Japanese, Thai, ...) each character is a word. Memory: the words of the training data, and one 32-bit hash per run of words,
of which at most about 5 million are kept (those that a power of two divides).

    overlap(general, training).describe()     # None where there is none
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WORDS = 8
SHARE = 0.5
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, Myanmar, Khmer, kana, CJK ideographs
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
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
    rows = [words(text) for text in training]
    every = 1
    while sum(map(len, rows)) / every > MOST:
        every *= 2
    whole = {" ".join(row) for row in rows}
    known = {shingle for row in rows for shingle in shingles(row, every)}
    exact, near = [], []
    for index, text in enumerate(general):
        mine = words(text)
        runs = set(shingles(mine, every))
        if " ".join(mine) in whole:
            exact.append(index)
        elif runs and len(runs & known) >= SHARE * len(runs):
            near.append(index)
    return Overlap(exact, near, len(general))


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def shingles(words: list[str], every: int) -> Iterator[int]:
    for start in range(len(words) - WORDS + 1):
        value = zlib.crc32(" ".join(words[start : start + WORDS]).encode())
        if value % every == 0:
            yield value
