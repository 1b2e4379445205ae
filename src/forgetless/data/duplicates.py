"""Near duplicates among texts: which documents of one set stand in another, and how one set is
divided into parts that share none.

Two texts are near duplicates where one holds at least half of the other's runs of eight words,
ignoring case, white space and punctuation.

    overlap(general, training).describe()     # which general documents were trained on
    carve(texts, [0.8, 0.2])                  # indices of two parts, near duplicates in one of them

`overlap` is asked before forgetting is measured: what is measured on text that was trained on says
nothing of forgetting. `carve` divides a data set into a part to learn and a part to test. A
question with other answers, a story told twice or a document quoted in another would otherwise be
learned in one part and tested in the other. Which part a text falls into depends on the text alone,
not on the order of the rows.

Runs are compared by a 32-bit hash of their words. Memory grows with the number of words.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forgetless.files.provenance import sha256_text

# Words in a run. Eight in a row seldom agree by chance.
RUN_WORDS = 8
# At least this fraction of a text's runs in another text makes them near duplicates.
COPIED_RUNS = 0.5
# A run of words in more texts than this is a form that they fill in, and no sign of copying.
FORM_TEXTS = 20
# Where the training words are more than this, only every second run is kept, or every fourth, and
# so on, so that the set of runs stays below a few hundred MB.
MOST_RUNS = 5_000_000
# Thai, Lao, Myanmar, Khmer, kana and CJK ideographs, which write no spaces: each character is a
# word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
# One such character, or a word of any other script.
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


@dataclass(frozen=True)
class Overlap:
    """Which of `documents` general documents the training data holds word for word (`exact`) and
    nearly (`near`), as indices.
    """

    exact: list[int]
    near: list[int]
    documents: int

    @property
    def first(self) -> int | None:
        """The number of the first such document, counted from 1; None where nothing overlaps."""
        return next((place + 1 for place in (*self.exact, *self.near)), None)

    def describe(self) -> str | None:
        """The overlap as people read it; None where nothing overlaps."""
        if self.first is None:
            return None
        return (
            f"the general text overlaps the training data: {len(self.exact)} of {self.documents} "
            f"documents are in it word for word and {len(self.near)} "
            f"nearly (first: document {self.first}); what is measured on them says nothing of "
            "forgetting. Use other general text, or remove them"
        )


def overlap(general: Sequence[str], training: Sequence[str]) -> Overlap:
    """Which documents of `general` occur in `training`, ignoring case and white space."""
    rows = [split_words(text) for text in training]
    every = 1
    while sum(map(len, rows)) / every > MOST_RUNS:
        every *= 2
    same = {" ".join(row) for row in rows}
    known = {run for row in rows for run in word_runs(row, every)}
    exact, near = [], []
    for index, text in enumerate(general):
        words = split_words(text)
        runs = set(word_runs(words, every))
        if " ".join(words) in same:
            exact.append(index)
        elif runs and len(runs & known) >= COPIED_RUNS * len(runs):
            near.append(index)
    return Overlap(exact, near, len(general))


def carve(texts: Sequence[str], fractions: Sequence[float]) -> list[list[int]]:
    """Indices of `texts` in as many parts as there are fractions, which add up to 1.

    A group of near duplicates falls into one part, by the hash of its first text in alphabetical
    order. The order within a part depends on the texts alone, too.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups(texts)):
        members[group].append(index)
    parts: list[list[tuple[str, int]]] = [[] for _ in fractions]
    for indices in members.values():
        number = int(sha256_text(min(texts[i] for i in indices))[:12], 16) / 16**12
        parts[_part_of(number, fractions)].extend((sha256_text(texts[i]), i) for i in indices)
    return [[index for _, index in sorted(part)] for part in parts]


def _part_of(number: float, fractions: Sequence[float]) -> int:
    """The part into which a number from 0 to 1 falls."""
    for part in range(len(fractions)):
        if number < sum(fractions[: part + 1]):
            return part
    return len(fractions) - 1


def groups(texts: Sequence[str]) -> list[int]:
    """The number of each text's group, which is the index of the group's first member.

    Texts are in one group where they are equal or near duplicates, directly or through others.
    """
    split = [split_words(text) for text in texts]
    runs = [set(word_runs(words, 1)) for words in split]
    holders: dict[int, list[int]] = defaultdict(list)  # run -> the texts that have it
    first: dict[str, int] = {}  # text -> the first that equals it
    union = _Union(len(texts))
    for i, words in enumerate(split):
        union.join(i, first.setdefault(" ".join(words), i))
        for run in runs[i]:
            holders[run].append(i)
    for i, mine in enumerate(runs):
        shared = Counter(
            j for run in mine if len(holders[run]) <= FORM_TEXTS for j in holders[run] if j < i
        )
        for j, count in shared.items():
            if count >= COPIED_RUNS * min(len(mine), len(runs[j])):
                union.join(i, j)
    return [union.leader(i) for i in range(len(texts))]


class _Union:
    """Groups of indices that grow together; each is led by its first member."""

    def __init__(self, count: int):
        self._above = list(range(count))

    def leader(self, i: int) -> int:
        while self._above[i] != i:
            self._above[i] = self._above[self._above[i]]
            i = self._above[i]
        return i

    def join(self, i: int, j: int) -> None:
        a, b = self.leader(i), self.leader(j)
        self._above[max(a, b)] = min(a, b)


def split_words(text: str) -> list[str]:
    """The words of a text, in small letters and without punctuation."""
    return WORD.findall(text.lower())


def word_runs(words: list[str], every: int) -> Iterator[int]:
    """Hashes of the runs of RUN_WORDS words, of them one in `every`."""
    for start in range(len(words) - RUN_WORDS + 1):
        value = zlib.crc32(" ".join(words[start : start + RUN_WORDS]).encode())
        if value % every == 0:
            yield value
