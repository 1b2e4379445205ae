"""TODO evaluate.losses."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from forgetless.data.documents import Document
from forgetless.data.encoding import Encoded, collate, encode_whole
from forgetless.data.tasks import encode_rows
from forgetless.errors import OptionError
from forgetless.evaluate.rise import ERROR, Rise, alone, numbered, paired_rise
from forgetless.model.loading import context_length

BATCH_TOKENS, BATCH_TOKENS_CPU = (
    4096,
    1024,
    # of a forward pass. On a CPU more leave its caches: 4,096 took 1.17x of the time of 1,024 on the
    # lab model
)


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of some documents: sums of nats and counts of scored tokens, both (documents,).

    `sources` says where each document comes from, and is None where all come from one place.
    """

    nats_by_document: np.ndarray
    tokens_by_document: np.ndarray
    utf8_bytes: int | None = None
    sources: Sequence[Hashable] | None = None

    @classmethod
    def read(cls, numbers: Mapping[str, Any]) -> TextLoss:
        """What `numbers` wrote, to pair another loss with; without the size of the text."""
        nats, tokens = numbers["nats_by_document"], numbers["tokens_by_document"]
        sources = numbers.get("source_by_document")
        return cls(np.array(nats), np.array(tokens), sources=sources)

    def rise(self, after: TextLoss, *, error: float = ERROR) -> Rise:
        """How much more the same documents lose in `after`; one document alone has no interval."""
        before, counts = self.nats_by_document, self.tokens_by_document
        if len(before) < 2:
            return alone(float((after.nats_by_document - before).sum() / counts.sum()), error=error)
        sources = self.sources or [""] * len(before)
        return paired_rise(before, after.nats_by_document, counts, sources, error=error)

    @property
    def tokens(self) -> int:
        return int(self.tokens_by_document.sum())

    @property
    def nats(self) -> float:
        """Nats per token over all documents."""
        return float(self.nats_by_document.sum() / self.tokens)

    @property
    def standard_error(self) -> float | None:
        """Of `nats`, over documents; None for a single document."""
        return ratio_error(self.nats_by_document, self.tokens_by_document)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def bits_per_byte(self) -> float | None:
        return (
            None
            if not self.utf8_bytes
            else float(self.nats_by_document.sum() / math.log(2) / self.utf8_bytes)
        )

    def numbers(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "nats": self.nats,
            "standard_error": self.standard_error,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "documents": len(self.tokens_by_document),
            "nats_by_document": self.nats_by_document.tolist(),
            "tokens_by_document": self.tokens_by_document.tolist(),
            "source_by_document": self._source_numbers(),
        }

    def _source_numbers(self) -> list[int] | None:
        """Each document's source as a number; None where all come from one source."""
        if self.sources is None or len(set(self.sources)) < 2:
            return None
        return [int(number) for number in numbered(self.sources)]


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sum(sums) / sum(counts) over independent documents (linearised ratio); None
    below two documents.
    """
    n = len(sums)
    if n < 2:
        return None
    residual = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / counts.sum())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _windows(encoded: Sequence[Encoded], window: int, stride: int) -> list[tuple[int, Encoded]]:
    """(document, window) pairs in which every token but a document's first is scored exactly once,
    with at least window - stride tokens before it.
    """
    cut = []
    for index, (ids, scored) in enumerate(encoded):
        end = 1  # targets before `end` have been scored
        while end < len(ids):
            stop = min(len(ids), end + (window - 1 if end == 1 else stride))
            start = max(0, stop - window)
            cut.append(
                (
                    index,
                    (
                        ids[start:stop],
                        [s and start + i >= end for i, s in enumerate(scored[start:stop])],
                    ),
                )
            )
            end = stop
    return cut


def text_loss(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    window: int,
    stride: int | None = None,
    batch_tokens: int | None = None,
    utf8_bytes: int | None = None,
    sources: Sequence[Hashable] | None = None,
    label: str = "evaluating",
) -> TextLoss:
    """Loss on encoded documents by windows of `window` tokens moving by `stride` (default half), in
    f32. Costs one forward pass over the windows.

    Documents without a scored token are left out of the result. Raises ValueError where none has
    any.
    """
    from tqdm import tqdm

    stride = stride or max(1, window // 2)
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS)
    if not window >= 2 or not 1 <= stride < window:
        raise OptionError(
            f"expected 1 <= stride < window and window >= 2, found window {window} and stride "
            f"{stride}"
        )
    cut = sorted(_windows(encoded, window, stride), key=lambda item: -len(item[1][0]))
    nats, tokens = np.zeros(len(encoded)), np.zeros(len(encoded))
    with (
        evaluating(model),
        tqdm(
            total=len(cut), desc=label, unit="window", disable=not sys.stderr.isatty(), leave=False
        ) as bar,
    ):
        start = 0
        while start < len(cut):
            group = cut[start : start + max(1, batch_tokens // len(cut[start][1][0]))]
            batch = {
                key: value.to(device)
                for key, value in collate([piece for _, piece in group], 0).items()
            }
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits.float()
            targets = nn.functional.pad(
                batch["labels"][:, 1:], (0, 1), value=-100
            )  # moved instead of the logits, which a slice or transpose would copy
            each = nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
            ).view_as(targets)
            for (index, _), total, count in zip(
                group, each.double().sum(1).tolist(), (targets != -100).sum(1).tolist(), strict=True
            ):
                nats[index] += total
                tokens[index] += count
            start += len(group)
            bar.update(len(group))
    scored = tokens > 0
    if not scored.any():
        raise ValueError(
            "no token of the text is scored; expected text of at least two tokens, or chats with "
            "assistant turns"
        )
    if sources is not None:
        sources = [source for source, some in zip(sources, scored, strict=True) if some]
    return TextLoss(nats[scored], tokens[scored], utf8_bytes, sources)


def general_loss(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> TextLoss:
    """Loss on general text. Bits per byte only where every document is plain text."""
    window = min(length or 2048, context_length(model))
    plain = all(document.text is not None for document in documents)
    size = sum(len((document.text or "").encode()) for document in documents) if plain else None
    encoded, with_tokens = encode_whole(documents, tokenizer)
    return text_loss(
        model,
        encoded,
        window=window,
        stride=stride,
        batch_tokens=batch_tokens,
        utf8_bytes=size,
        sources=[document.source for document in with_tokens],
        label="general text",
    )


def completion_loss(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    *,
    length: int | None = None,
    batch_tokens: int | None = None,
) -> TextLoss:
    """Loss on held-out domain data: on completions, assistant turns, or all of the text.

    A prompt too long for the window loses its beginning.
    """
    window = min(length or 2048, context_length(model))
    encoded = encode_rows(data, tokenizer)
    if "prompt" in data.column_names:
        encoded = [last_window(pair, window) for pair in encoded]
    return text_loss(model, encoded, window=window, batch_tokens=batch_tokens, label="domain data")


def last_window(encoded: Encoded, window: int) -> Encoded:
    ids, scored = encoded
    return ids[-window:], scored[-window:]
