"""What a method does: at most a few functions, each for one place in the story of `tune`.

`forgetless.options.methods` has the row of every method, which names these functions and says what
each place is; `forgetless.methods.table` loads them. Methods are combined by filling different
places; any number of terms adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from forgetless.data.encoding import Encoded
from forgetless.evaluate.divergence import StoredBase
from forgetless.files.measured_json import Measured
from forgetless.importance.importance import Importance
from forgetless.options.tune import TuneOptions


class Term(Protocol):
    """A part of the loss that is not the data's."""

    def add(self, step: int, *, scale: float = 1.0) -> None:
        """Add its gradient times `scale` to `.grad`, once per optimizer step."""
        ...

    def logs(self) -> dict[str, float]:
        """What it was at the last step, by the name that it has in the log."""
        ...


@dataclass(frozen=True)
class Setup:
    """What the functions of a method may read.

    `text` holds --replay's sequences, `tokens_per_step` the scored domain tokens of an average
    step, `before` the numbers of the bare base, `stored` what an importance file kept of the base
    for each sequence of `text`, `kinds` of what kind each of them is.
    """

    options: TuneOptions
    tokenizer: Any
    text: Sequence[Encoded]
    tokens_per_step: float
    importance: Importance | None = None
    layers: Any = None
    before: Measured | None = None
    stored: Sequence[StoredBase] | None = None
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class MethodSteps:
    """The functions of one method; None where tuning is plain."""

    rows: Callable[[Setup, nn.Module, Any], Any] | None = None
    adapter: Callable[[Setup, nn.Module], nn.Module] | None = None
    start: Callable[[Setup, nn.Module], None] | None = None
    optimizer: Callable[[Setup, nn.Module], Any] | None = None
    objective: Callable[[Setup, nn.Module], Any] | None = None
    loss: Callable[[Setup, nn.Module], Term | None] | None = None
    pull: Callable[[Setup, nn.Module], Any] | None = None
    after_step: Callable[[Setup, nn.Module], Any] | None = None
    finish: Callable[[Setup, nn.Module], dict[str, float]] | None = None
    save: Callable[[Setup, nn.Module, Path], None] | None = None
