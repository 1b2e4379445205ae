"""What a method is: one frozen record of at most a few functions, each for one place in the story
of `tune`. Where a record has none, tuning is plain.

    adapter     the bare model -> the model to train
    start       what happens to the model to train before tuning
    optimizer   the model to train -> a torch optimizer
    loss        a term: adds its gradient once per optimizer step, before the data's gradients are
                there, so that clipping sees the sum
    pull        a penalty: adds its gradient right before the step, after clipping
    finish      the trained model -> numbers for run.json; may change the model in place
    save        how to write the adapter, where not as it is

Methods are combined by filling different places; any number of terms adds up.
`forgetless.methods.table` holds the records and says what cannot be combined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from forgetless.data.encoding import Encoded
from forgetless.importance.importance import Importance
from forgetless.options.tune import TuneOptions


class Term(Protocol):
    """A part of the loss that is not the data's:

    `add` puts its gradient into `.grad` once per optimizer step, `logs` says what it was.
    """

    def add(self, step: int, *, scale: float = 1.0) -> None: ...
    def logs(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Setup:
    """What the functions of a method may read.

    `text` holds --replay's sequences, `tokens_per_step` the scored domain tokens of an average
    step, `before` the numbers of the bare base.
    """

    options: TuneOptions
    tokenizer: Any
    text: Sequence[Encoded]
    tokens_per_step: float
    importance: Importance | None = None
    layers: Any = None
    before: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Method:
    """One method.

    `needs` are options without which it cannot work, `reads` the ones of methods that mean
    something to it (needs included).

    `check` raises OptionError for options that do not fit it; `refuses` maps the names of methods
    to the reason why they cannot be combined with this one.
    """

    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    check: Callable[[TuneOptions], None] | None = None
    adapter: Callable[[Setup, nn.Module], nn.Module] | None = None
    start: Callable[[Setup, nn.Module], None] | None = None
    optimizer: Callable[[Setup, nn.Module], Any] | None = None
    loss: Callable[[Setup, nn.Module], Term | None] | None = None
    pull: Callable[[Setup, nn.Module], Any] | None = None
    finish: Callable[[Setup, nn.Module], dict[str, Any]] | None = None
    save: Callable[[Setup, nn.Module, Path], None] | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
