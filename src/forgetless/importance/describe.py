"""What is in an importance file, for people: where it comes from, what its tier costs, and for each
weight size, norms and a histogram.

    print(describe_file("model.importance.safetensors"))

The histogram of a weight shows its non-zero elements over log10 of importance, on the same axis for
all weights: at most 12 decades, the smaller ones in the first column. Heights are relative to the
weight's fullest column.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgetless.errors import printable
from forgetless.importance.entries import Entry, tier_of
from forgetless.importance.file import Stored
from forgetless.report.terminal import table

# Columns of a histogram.
HISTOGRAM_COLUMNS = 24
# Decades below the largest value that a histogram reaches; smaller values are in its first column.
DECADES = 12.0
# Elements of a weight that are looked at, at most: enough for a histogram, whatever a file claims.
LOOKED = 1 << 26
# Elements that are looked at at a time.
AT_A_TIME = 1 << 22
# How full a column is, from empty to full.
BLOCKS = " ▁▂▃▄▅▆▇█"


def describe(importance: Stored) -> str:
    """Where importance comes from, the error of its tier, and a line for each weight: shape, size,
    norm, mean, largest value, how many are zero, histogram.
    """
    low, high = _decades(importance)
    axis = f"{low:<+8.1f}{'log10':^{HISTOGRAM_COLUMNS - 16}}{high:>+8.1f}"
    met: set[int] = set()
    rows = []
    for name, entry in importance.entries.items():
        seen = _statistics(entry, low, high)
        rows.append(
            [
                name,
                f"{entry.shape[0]} x {entry.shape[1]}",
                f"{_bytes({name: entry}, met) / 1024:.1f}",
                f"{entry.norm():.3g}",
                f"{seen.mean:.3g}",
                f"{seen.largest:.3g}",
                f"{seen.zeros:.1%}",
                _blocks(seen.counts),
            ]
        )
    columns = ["weight", "shape", "KiB", "norm", "mean", "max", "zero", axis]
    return "\n".join([*_head(importance), "", table(columns, rows)])


def histogram(values: Tensor, low: float, high: float) -> str:
    """The non-zero values over log10, from `low` to `high`, as HISTOGRAM_COLUMNS blocks.

    Values below `low` are in the first one. A column that is not empty shows.
    """
    return _blocks(_counts(values, low, high))


def _counts(values: Tensor, low: float, high: float) -> Tensor:
    return torch.histc(
        values[values > 0].float().log10().clamp(low, high),
        bins=HISTOGRAM_COLUMNS,
        min=low,
        max=max(high, low + 1e-3),
    )


def _blocks(counts: Tensor) -> str:
    top = max(float(counts.max()), 1.0)
    return "".join(BLOCKS[math.ceil(8 * float(count) / top)] for count in counts)


def _parts(entry: Entry) -> Iterator[Tensor]:
    """The elements, some rows at a time: all of them, or evenly spaced rows of a weight with more
    than LOOKED. A few KB of factors stand for any number.
    """
    out, into = entry.shape
    step = -(-out * into // LOOKED)
    rows = max(1, AT_A_TIME // into) * step
    for first in range(0, out, rows):
        yield entry.rows(slice(first, first + rows, step)).float()


@dataclass(frozen=True)
class _Statistics:
    """What is shown of one weight's elements."""

    mean: float
    largest: float
    zeros: float  # which fraction of them is zero
    counts: Tensor  # (HISTOGRAM_COLUMNS,), of the histogram


def _statistics(entry: Entry, low: float, high: float) -> _Statistics:
    total, largest, zeros, seen = 0.0, 0.0, 0, 0
    counts = torch.zeros(HISTOGRAM_COLUMNS)
    for part in _parts(entry):
        total += float(part.double().sum())
        largest = max(largest, float(part.max()))
        zeros += int((part == 0).sum())
        seen += part.numel()
        counts += _counts(part, low, high)
    return _Statistics(total / seen, largest, zeros / seen, counts)


def _decades(importance: Stored) -> tuple[float, float]:
    """log10 of the smallest (at most 12 decades down) and the largest value of all weights; (0, 0)
    where all are zero.
    """
    ends: list[float] = []
    for entry in importance.entries.values():
        for part in _parts(entry):
            if bool((part > 0).any()):
                ends += [math.log10(float(end)) for end in part[part > 0].aminmax()]
    return (max(min(ends), max(ends) - DECADES), max(ends)) if ends else (0.0, 0.0)


def _head(importance: Stored) -> list[str]:
    info = importance.info
    model, data = info.get("model", {}), info.get("data", {})
    lines = [
        f"estimator    {info.get('estimator', '?')}",
        textwrap.fill(
            f"settings     {printable(_shown_settings(info), longest=4000)}",
            120,
            subsequent_indent=" " * 13,
            break_on_hyphens=False,
        ),
        f"unit         {info.get('unit', '?')}",
        f"tier         {tier_of(importance.entries)}",
        *_errors(info),
        f"base model   {model.get('name', '?')} (fingerprint "
        f"{str(model.get('fingerprint', '?'))[:12]})",
        f"data         {data.get('source', '?')}: {data.get('documents', '?')} documents, "
        f"{data.get('tokens', '?')} tokens, "
        f"sha256 {str(data.get('sha256', '?'))[:12]}",
        f"anchor       {_anchor(importance)}",
        f"calibration  {importance.calibration.describe() if importance.calibration else 'none'}",
        f"weights      {len(importance.entries)} with "
        f"{sum(e.shape[0] * e.shape[1] for e in importance.entries.values()):,} elements, "
        f"stored in {_bytes(importance.entries) / 2**20:.2f} MiB",
    ]
    if tier_of(importance.entries).startswith("kronecker"):
        lines.append(
            "             mean, max, zero and histogram are of the diagonal; size without an "
            "input covariance that is stored with another weight"
        )
    if large := sum(math.prod(entry.shape) > LOOKED for entry in importance.entries.values()):
        lines.append(
            f"             mean, max, zero and histogram of {large} weights with more than "
            f"{LOOKED:,} elements are of evenly spaced rows"
        )
    return [line if line == lines[1] else printable(line) for line in lines]


def _anchor(importance: Stored) -> str:
    if not importance.anchors:
        return "none"
    A, _ = next(iter(importance.anchors.values()))
    return f"recorded adapter, rank {A.shape[0]}"


def _errors(info: Mapping[str, Any]) -> list[str]:
    """One line on what the tier did to the energy, where the file says it."""
    stored = info.get("energy_error", {})
    pairs = list(stored.get("weights", {}).values())
    if not pairs:
        return []
    words = []
    for kind, errors in zip(("random", "evading"), zip(*pairs, strict=True), strict=True):
        words.append(
            f"{kind} update: median {_percent(statistics.median(errors))}, largest "
            f"{_percent(max(errors))}"
        )
    return [f"energy error {'; '.join(words)} (per weight, against {stored.get('against', '?')})"]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"


def _bytes(entries: Mapping[str, Entry], met: set[int] | None = None) -> int:
    """Bytes of the tensors of some entries, each counted once; `met` carries what was counted
    before.
    """
    met, total = set() if met is None else met, 0
    for entry in entries.values():
        for tensor in entry.tensors().values():
            total += 0 if id(tensor) in met else tensor.numel() * tensor.element_size()
            met.add(id(tensor))
    return total


def _shown_settings(info: Mapping[str, Any]) -> str:
    """The settings that say something: not the options left at nothing, off or automatic."""
    shown = {
        key: value
        for key, value in sorted(info.get("settings", {}).items())
        if value not in (None, False, "auto", "none", "")
    }
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in shown.items()
    )
