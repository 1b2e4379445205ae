"""How an observing recorder divides its weights into groups, each seen in a pass of its own.

Where the sums of all weights do not fit into memory together, each pass over the text sees one
group. Weights that read the same input stay in one group. What a finished group amounts to waits on
the CPU. The result is that of one pass, bit for bit: the passes differ only in which layers are
watched.

    division = Division(layers)                       # one group at first
    division.divide(in_groups(layers, leaders, size, 4))
    division.observed                                 # the layers that the present pass sees
    division.end_pass(entries)                        # the next group begins, if there is one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from forgetless.importance.entries import Entry, from_plain, to_plain, with_tensors
from forgetless.importance.info import EnergyErrors
from forgetless.model.targets import BaseLayer


@dataclass(frozen=True)
class DivisionState:
    """Where a division stands, for a saved state."""

    group: int
    tokens: int | None
    groups: list[list[str]]  # names of weights
    errors: dict[str, tuple[float, float]]
    done: dict[str, Any]  # weight -> its entry, as `entries.to_plain` makes it


class Division:
    """The groups of weights, the one that the present pass sees, and what came of those before."""

    def __init__(self, layers: list[BaseLayer]):
        self.groups = [layers]
        self.group = 0  # that of the present pass; as many as there are groups when all have ended
        self.observed = layers
        self.done: dict[str, Entry] = {}  # of the groups before
        self.tokens: int | None = None  # that the first pass saw
        # Relative errors of each weight's energy, where what was summed is cut (energy_errors.py).
        self.errors: dict[str, tuple[float, float]] = {}

    @property
    def is_last(self) -> bool:
        """Whether no other group follows the present one."""
        return self.group >= len(self.groups) - 1

    @property
    def has_ended(self) -> bool:
        """Whether the passes of all groups have ended."""
        return self.group >= len(self.groups)

    def divide(self, groups: list[list[BaseLayer]]) -> None:
        """Have these groups from now on; the first pass sees the first of them."""
        self.groups = groups
        self.observed = groups[0]

    def check_same_text(self, tokens: int) -> None:
        """Raise ValueError where a pass saw another number of tokens than the first one."""
        if self.tokens not in (None, tokens):
            raise ValueError(
                f"pass {self.group + 1} saw {tokens} tokens, the first {self.tokens}: "
                "give every pass the same text"
            )
        self.tokens = tokens

    def end_pass(self, entries: Mapping[str, Entry]) -> None:
        """Put the entries of the present group aside, on the CPU, and go on to the next group."""
        moved: dict[int, Any] = {}
        for name, entry in entries.items():
            self.done[name] = with_tensors(entry, lambda tensor: tensor.cpu(), moved)
        self.group += 1
        if not self.has_ended:
            self.observed = self.groups[self.group]

    def energy_errors(self, estimator: str, names: Iterable[str]) -> EnergyErrors | None:
        """The errors of those of these weights that have one, for the importance file; None where
        nothing was cut.
        """
        if not self.errors:
            return None
        by_weight = {name: list(self.errors[name]) for name in names if name in self.errors}
        return EnergyErrors(against=estimator, weights=by_weight)

    def state(self) -> DivisionState:
        """What `restore` goes on from."""
        plain_parts: dict[int, Any] = {}
        return DivisionState(
            group=self.group,
            tokens=self.tokens,
            groups=[[layer.name for layer in group] for group in self.groups],
            errors=self.errors,
            done={name: to_plain(entry, plain_parts) for name, entry in self.done.items()},
        )

    def restore(self, state: DivisionState, layers: Mapping[str, BaseLayer]) -> None:
        """Be where `state` was taken; `layers`: weight -> layer."""
        entry_parts: dict[int, Any] = {}
        self.groups = [[layers[name] for name in group] for group in state.groups]
        self.done = {name: from_plain(plain, entry_parts) for name, plain in state.done.items()}
        self.errors = dict(state.errors)
        self.group, self.tokens = state.group, state.tokens
        self.observed = self.groups[min(self.group, len(self.groups) - 1)]


class Named(Protocol):
    """Anything that stands for a weight by its name."""

    @property
    def name(self) -> str: ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


def in_groups(
    layers: Sequence[AnyNamed],
    leaders: Mapping[str, str],
    size: Callable[[AnyNamed], int],
    groups: int,
) -> list[list[AnyNamed]]:
    """The layers in so many groups of similar size, never more.

    `leaders`: weight -> the first weight that reads the same input; they stay in one group.
    """
    together: dict[str, list[AnyNamed]] = {}
    for layer in layers:
        together.setdefault(leaders.get(layer.name, layer.name), []).append(layer)
    total, before = sum(map(size, layers)), 0
    division: dict[int, list[AnyNamed]] = {}
    for sharing in together.values():
        size_here = sum(map(size, sharing))
        group = int(groups * (before + size_here / 2) / total)  # where their middle lies among all
        division.setdefault(group, []).extend(sharing)
        before += size_here
    return list(division.values())
