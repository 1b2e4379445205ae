"""Parts of a data set that share nothing: near duplicates fall into one part, and which one depends on the text alone, not on the order of the rows.

    groups     texts that are equal, or share at least half of the shorter one's runs of 8 words (overlap.py), directly or through others
    carve      each group to a part, by the hash of its first text in alphabetical order

A question with other answers, a story told twice or a document quoted in another would otherwise be learned in one part and tested in the other.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from holdfast.overlap import SHARE, shingles, words

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
        shared = Counter(j for run in mine if len(where[run]) <= COMMON for j in where[run] if j < i)
        for j, count in shared.items():
            if count >= SHARE * min(len(mine), len(runs[j])):
                a, b = find(i), find(j)
                leader[max(a, b)] = min(a, b)
    return [find(i) for i in range(len(texts))]


def carve(texts: Sequence[str], shares: Sequence[float]) -> list[list[int]]:
    """Indices of `texts` in as many parts as there are shares (which add up to 1), each in an order that depends on the text alone."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups(texts)):
        members[group].append(index)
    parts: list[list[tuple[str, int]]] = [[] for _ in shares]
    for indices in members.values():
        number = int(_digest(min(texts[i] for i in indices))[:12], 16) / 16**12
        part = next((k for k in range(len(shares)) if number < sum(shares[: k + 1])), len(shares) - 1)
        parts[part].extend((_digest(texts[i]), i) for i in indices)
    return [[index for _, index in sorted(part)] for part in parts]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
