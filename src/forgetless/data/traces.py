"""What an importance file keeps of the text that it was recorded on: hashes, by which the same text
is known again when forgetting is measured.

What is measured on text that importance was recorded on says too little of forgetting: the model is
held on just these documents, and the interval of a budget on them missed in 3 of 6 runs where it
promises 1 in 80. So a file has a hash of each document and of runs of words (duplicates.py):

    traces = traces_of(texts)          # when recording
    traces.plain()                     # as the file has them, in the metadata under data.traces
    read_traces(plain)                 # checked, or a ValueError
    traces.overlap(general).exact      # indices of documents that were recorded on

The hashes say whether a text was among those recorded on, and not what the texts were. Of many
the smallest are kept, which is a random sample: at most 384 KiB in all.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forgetless.data.duplicates import COPIED_RUNS, RUN_WORDS, Overlap, split_words, word_runs
from forgetless.files.provenance import sha256_text
from forgetless.files.untrusted import JsonObject

# Hashes of either kind that a file keeps at most: of a million words that is one run in 30, some
# ten of a document of 300 words.
MOST_HASHES = 1 << 15
# Bytes of a document's hash and of a run's, both stored with the lowest byte first.
STORED: dict[str, np.dtype[Any]] = {"documents": np.dtype("<u8"), "runs": np.dtype("<u4")}
# Words of a token, for a plan of the size alone: of prose in English. Source code has fewer, 0.46
# in a module of ours by SmolLM2's tokenizer; beyond 45 thousand tokens of prose nothing changes.
WORDS_PER_TOKEN = 0.75
# Tokens of a document, for a plan too: those of the longest answer of the model's own, which is
# what `record` samples where no text is given.
TOKENS_OF_DOCUMENT = 256


@dataclass(frozen=True)
class Traces:
    """Hashes of the documents that importance was recorded on, and of their runs of words."""

    documents: frozenset[int]
    runs: frozenset[int]

    def plain(self) -> JsonObject:
        """As JSON holds them: sorted, in base64 without slashes, as no path has them."""
        return {
            name: base64.urlsafe_b64encode(
                np.array(sorted(getattr(self, name)), dtype=dtype).tobytes()
            ).decode()
            for name, dtype in STORED.items()
        }

    def overlap(self, texts: Sequence[str]) -> Overlap:
        """Which of `texts` were recorded on, word for word or nearly."""
        highest_document, highest_run = _highest(self.documents), _highest(self.runs)
        exact, near = [], []
        for index, text in enumerate(texts):
            words = split_words(text)
            own = _hash_of(words)
            runs = {run for run in word_runs(words, 1) if run <= highest_run}
            if words and own <= highest_document and own in self.documents:
                exact.append(index)
            elif runs and len(runs & self.runs) >= COPIED_RUNS * len(runs):
                near.append(index)
        return Overlap(exact, near, len(texts))


def traces_of(texts: Iterable[str]) -> Traces:
    """The traces of the texts that importance is recorded on."""
    documents: set[int] = set()
    runs: set[int] = set()
    for text in texts:
        words = split_words(text)
        if words:
            documents.add(_hash_of(words))
        runs.update(word_runs(words, 1))
        if len(runs) > 64 * MOST_HASHES:
            runs = set(_smallest(runs))
    return Traces(_smallest(documents), _smallest(runs))


def planned_characters(tokens: int) -> dict[str, int]:
    """About how many characters the traces of so many tokens of text take, by name."""
    documents = -(-tokens // TOKENS_OF_DOCUMENT)
    runs = max(0, int(WORDS_PER_TOKEN * tokens) - (RUN_WORDS - 1) * documents)
    counts = {"documents": documents, "runs": runs}
    sizes = {
        name: min(counts[name], MOST_HASHES) * dtype.itemsize for name, dtype in STORED.items()
    }
    return {name: 4 * -(-size // 3) for name, size in sizes.items()}  # in base64


def read_traces(plain: object) -> Traces:
    """The traces that a file holds. Raises ValueError where they are not what is written there."""
    if not isinstance(plain, Mapping) or not set(STORED) <= set(plain):
        raise ValueError("no hashes of documents and of runs of words")
    return Traces(*(_stored_hashes(name, plain[name], dtype) for name, dtype in STORED.items()))


def _stored_hashes(name: str, stored: object, dtype: np.dtype[Any]) -> frozenset[int]:
    if not isinstance(stored, str):
        raise ValueError(f"the hashes of {name} are no text")
    try:
        data = base64.b64decode(stored, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"the hashes of {name} are not base64") from None
    if len(data) % dtype.itemsize or len(data) > MOST_HASHES * dtype.itemsize:
        raise ValueError(f"the hashes of {name} have {len(data)} bytes")
    return frozenset(np.frombuffer(data, dtype=dtype).tolist())


def _hash_of(words: Sequence[str]) -> int:
    return int(sha256_text(" ".join(words))[:16], 16)


def _smallest(hashes: Collection[int]) -> frozenset[int]:
    """At most MOST_HASHES of them."""
    if len(hashes) <= MOST_HASHES:
        return frozenset(hashes)
    ordered = np.sort(np.fromiter(hashes, np.uint64, len(hashes)))
    return frozenset(ordered[:MOST_HASHES].tolist())


def _highest(hashes: frozenset[int]) -> float:
    """The highest hash of which can be said whether it was there."""
    return max(hashes) if len(hashes) >= MOST_HASHES else float("inf")
