"""Parts of a data set that share nothing: near duplicates fall into one part, and which one depends
on the text alone, not on the order of the rows.

    groups     texts that are equal, or share at least half of the shorter one's runs of 8 words
               (duplicates.py), directly or through others
    carve      each group to a part, by the hash of its first text in alphabetical order

A question with other answers, a story told twice or a document quoted in another would otherwise be
learned in one part and tested in the other.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

COMMON = 20  # a run of words in more texts than this is a template, not a sign of copying


def groups(texts: Sequence[str]) -> list[int]:
    """The number of each text's group: the index of its first member."""
    leader = list(range(len(texts)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    split = [words(text) for text in texts]
    same: dict[str, int] = {}
    where: dict[int, list[int]] = defaultdict(list)
    runs = [set(shingles(row, 1)) for row in split]
    for i, row in enumerate(split):
        first = same.setdefault(" ".join(row), i)
        leader[find(i)] = find(first)
        for run in runs[i]:
            where[run].append(i)
    for i, mine in enumerate(runs):
        shared = Counter(
            j for run in mine if len(where[run]) <= COMMON for j in where[run] if j < i
        )
        for j, count in shared.items():
            if count >= SHARE * min(len(mine), len(runs[j])):
                a, b = find(i), find(j)
                leader[max(a, b)] = min(a, b)
    return [find(i) for i in range(len(texts))]


def carve(texts: Sequence[str], shares: Sequence[float]) -> list[list[int]]:
    """Indices of `texts` in as many parts as there are shares (which add up to 1), each in an order
    that depends on the text alone.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups(texts)):
        members[group].append(index)
    parts: list[list[tuple[str, int]]] = [[] for _ in shares]
    for indices in members.values():
        number = int(_digest(min(texts[i] for i in indices))[:12], 16) / 16**12
        part = next(
            (k for k in range(len(shares)) if number < sum(shares[: k + 1])), len(shares) - 1
        )
        parts[part].extend((_digest(texts[i]), i) for i in indices)
    return [[index for _, index in sorted(part)] for part in parts]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


WORDS = 8
SHARE = 0.5
# Thai, Lao, Myanmar, Khmer, kana, CJK ideographs
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
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
        return (
            f"the general text overlaps the training data: {len(self.exact)} of {self.documents} "
            f"documents are in it word for word and {len(self.near)} "
            f"nearly (first: document {first}); what is measured on them says nothing of "
            "forgetting. Use other general text, or remove them"
        )


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
