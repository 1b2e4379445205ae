"""Losses on text: cross-entropy in nats per token, document by document, so that two states of a
model can be compared on the same documents.

    loss = general_loss(model, tokenizer, documents)         # of rows: completion_loss
    loss.nats, loss.standard_error, loss.perplexity          # 3.21, 0.02, exp(3.21)
    loss.rise(general_loss(tuned, tokenizer, documents))     # paired by document

A document longer than the window is read by windows that move by half of one, so that every token
but the first is scored once, with at least half a window before it. The sums are in f64 over
cross-entropies in f32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forgetless.data.documents import Document
from forgetless.data.domain import DomainRows, encode_rows
from forgetless.data.encoding import Encoded, collate, encode_whole
from forgetless.errors import OptionError
from forgetless.evaluate.rise import ERROR_LEVEL, Rise, alone, numbered, paired_rise
from forgetless.files.measured_json import Loss
from forgetless.files.schema import plain_of
from forgetless.files.untrusted import JsonObject
from forgetless.model.loading import context_length
from forgetless.report.terminal import progress

# Tokens of one forward pass on a GPU.
BATCH_TOKENS = 4096
# Tokens of one forward pass on a CPU, of which more leave its caches: 4,096 took 1.17x of the time
# of 1,024 on the lab model.
BATCH_TOKENS_CPU = 1024
# Tokens of the window where no length is given; a model with a smaller context has a smaller one.
LONGEST_WINDOW = 2048


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
    def of(cls, loss: Loss) -> TextLoss:
        """What `record` made, to pair another loss with; without the size of the text."""
        nats, tokens = np.array(loss.nats_by_document), np.array(loss.tokens_by_document)
        return cls(nats, tokens, sources=loss.source_by_document)

    @classmethod
    def read(cls, numbers: JsonObject) -> TextLoss:
        """The losses that `numbers` wrote."""
        nats, tokens = numbers["nats_by_document"], numbers["tokens_by_document"]
        sources = numbers.get("source_by_document")
        return cls(np.array(nats), np.array(tokens), sources=sources)

    def rise(self, after: TextLoss, *, error: float = ERROR_LEVEL) -> Rise:
        """How much more the same documents lose in `after`; one document alone has no interval."""
        before, counts = self.nats_by_document, self.tokens_by_document
        if len(before) < 2:
            return alone(float((after.nats_by_document - before).sum() / counts.sum()), error=error)
        sources = self.sources or [""] * len(before)
        return paired_rise(before, after.nats_by_document, counts, sources, error=error)

    @property
    def tokens(self) -> int:
        """Scored tokens of all documents."""
        return int(self.tokens_by_document.sum())

    @property
    def nats(self) -> float:
        """Nats per token over all documents."""
        return float(self.nats_by_document.sum() / self.tokens)

    @property
    def standard_error(self) -> float | None:
        """The standard error of `nats` over documents; None for a single document."""
        return ratio_error(self.nats_by_document, self.tokens_by_document)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text; None where its size is not known."""
        if not self.utf8_bytes:
            return None
        return float(self.nats_by_document.sum() / math.log(2) / self.utf8_bytes)

    def record(self) -> Loss:
        """The losses as a file has them."""
        return Loss(
            nats=self.nats,
            standard_error=self.standard_error,
            perplexity=self.perplexity,
            bits_per_byte=self.bits_per_byte,
            tokens=self.tokens,
            documents=len(self.tokens_by_document),
            nats_by_document=self.nats_by_document.tolist(),
            tokens_by_document=self.tokens_by_document.tolist(),
            source_by_document=self._source_numbers(),
        )

    def numbers(self) -> JsonObject:
        """`record` as plain data."""
        return plain_of(self.record())

    def _source_numbers(self) -> list[int | None] | None:
        """Each document's source as a number; None where all come from one source."""
        if self.sources is None or len(set(self.sources)) < 2:
            return None
        return [int(number) for number in numbered(self.sources)]


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sum(sums) / sum(counts) over independent documents, both (documents,), as
    of a linearised ratio; None below two documents.
    """
    n = len(sums)
    if n < 2:
        return None
    residual = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / counts.sum())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, as it was before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Window:
    """Some tokens of one document, and which of them are scored here."""

    document: int
    ids: list[int]
    scored: list[bool]


def _windows(encoded: Sequence[Encoded], size: int, stride: int) -> list[Window]:
    """Windows in which every token but a document's first is scored exactly once, with at least
    size - stride tokens before it.
    """
    windows = []
    for document, (ids, scored) in enumerate(encoded):
        end = 1  # the targets before `end` have been scored
        while end < len(ids):
            stop = min(len(ids), end + (size - 1 if end == 1 else stride))
            start = max(0, stop - size)
            new = [mark and start + i >= end for i, mark in enumerate(scored[start:stop])]
            windows.append(Window(document, ids[start:stop], new))
            end = stop
    return windows


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
    """Loss on encoded documents by windows of `window` tokens that move by `stride` (default: half
    of one). Costs one forward pass over the windows.

    Documents without a scored token are left out of the result. Raises ValueError where no document
    has one, and OptionError for a window or stride that cannot be.
    """
    stride = stride or max(1, window // 2)
    _check_window(window, stride)
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS)
    # The longest first, so that the windows of one batch are of nearly one length.
    windows = sorted(_windows(encoded, window, stride), key=lambda each: -len(each.ids))
    nats = np.zeros(len(encoded))
    tokens = np.zeros(len(encoded))
    with evaluating(model), progress(label, len(windows), unit="window") as bar:
        start = 0
        while start < len(windows):
            group = windows[start : start + max(1, batch_tokens // len(windows[start].ids))]
            sums, counts = _scored_sums(model, group, device)
            for each, total, count in zip(group, sums, counts, strict=True):
                nats[each.document] += total
                tokens[each.document] += count
            start += len(group)
            bar.advance(len(group))
    scored = tokens > 0
    if not scored.any():
        raise ValueError(
            "no token of the text is scored; expected text of at least two tokens, or chats with "
            "assistant turns"
        )
    if sources is not None:
        sources = [source for source, some in zip(sources, scored, strict=True) if some]
    return TextLoss(nats[scored], tokens[scored], utf8_bytes, sources)


def _check_window(window: int, stride: int) -> None:
    """Raise OptionError for a window that holds no target, or that would leave tokens out."""
    if not window >= 2 or not 1 <= stride < window:
        raise OptionError(
            f"expected 1 <= stride < window and window >= 2, found window {window} and stride "
            f"{stride}"
        )


def _scored_sums(
    model: nn.Module, windows: Sequence[Window], device: torch.device
) -> tuple[list[float], list[int]]:
    """The summed loss of the scored tokens in each window, in nats, and how many they are."""
    collated = collate([(each.ids, each.scored) for each in windows], 0)
    batch = {key: value.to(device) for key, value in collated.items()}
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: Tensor = output.logits.float()  # (windows, longest, vocabulary)
    # The targets are moved instead of the logits, which a slice or transpose would copy.
    targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    ).view_as(targets)
    return losses.double().sum(1).tolist(), (targets != -100).sum(1).tolist()


def general_loss(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
) -> TextLoss:
    """Loss on general text. Bits per byte are known only where every document is plain text."""
    window = min(length or LONGEST_WINDOW, context_length(model))
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
    data: DomainRows,
    *,
    length: int | None = None,
    batch_tokens: int | None = None,
) -> TextLoss:
    """Loss on held-out domain data: on
    completions, assistant turns, or all of the text.

    A prompt too long for the window loses its beginning.
    """
    window = min(length or LONGEST_WINDOW, context_length(model))
    encoded = encode_rows(data, tokenizer)
    if "prompt" in data[0]:
        encoded = [last_window(pair, window) for pair in encoded]
    return text_loss(model, encoded, window=window, batch_tokens=batch_tokens, label="domain data")


def last_window(encoded: Encoded, window: int) -> Encoded:
    """The last `window` tokens of an encoded text."""
    ids, scored = encoded
    return ids[-window:], scored[-window:]
