"""Layer coefficients c_l: how the strength is shared out among the target weights.

Each way is a frozen dataclass with one function, `coefficients(norms, weights)`: Frobenius norm of
each weight's importance and the weights themselves -> name -> c_l. All of them average to 1, so
that strength keeps its meaning, except the paper's softmax, which sums to 1 (arXiv 2501.13669).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forgetless.errors import OptionError, nearest
from forgetless.options.tune import LAYERS


class Placed(Protocol):
    """What a layer function reads of a weight."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def kind(self) -> str: ...


Coefficients = dict[str, float]


def _softmax(values: Mapping[str, float]) -> Coefficients:
    top = max(values.values())
    powers = {name: math.exp(value - top) for name, value in values.items()}
    total = sum(powers.values())
    return {name: power / total for name, power in powers.items()}


def _average_one(values: Mapping[str, float]) -> Coefficients:
    mean = sum(values.values()) / len(values)
    if not mean > 0:
        raise OptionError("layer coefficients must not all be zero")
    return {name: value / mean for name, value in values.items()}


@dataclass(frozen=True)
class Uniform:
    """c_l = 1."""

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        return {weight.name: 1.0 for weight in weights}


@dataclass(frozen=True)
class Softmax:
    """The paper's c = softmax(tau * ||Omega_l||_F) over target weights; sums to 1.

    At the paper's tau = 1e-8 nearly uniform at 1 / (number of weights).
    """

    tau: float = 1e-8

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        return _softmax({weight.name: self.tau * norms[weight.name] for weight in weights})


@dataclass(frozen=True)
class ScaleFree:
    """softmax(tau * ||Omega_l|| / mean norm), averaging to 1: the unit of importance no longer
    matters, so tau near 1 does something.
    """

    tau: float = 1.0

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        mean = sum(norms[weight.name] for weight in weights) / len(weights)
        scaled = {
            weight.name: self.tau * norms[weight.name] / mean if mean > 0 else 0.0
            for weight in weights
        }
        return _average_one(_softmax(scaled))


@dataclass(frozen=True)
class OverDepth:
    """Numbers interpolated linearly over depth, first block to last, then averaging to 1.

    Weights outside the blocks get 1 before averaging.
    """

    points: tuple[float, ...]

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        last = max((weight.layer for weight in weights if weight.layer is not None), default=0)
        return _average_one(
            {
                weight.name: 1.0 if weight.layer is None else self._at(weight.layer / max(last, 1))
                for weight in weights
            }
        )

    def _at(self, depth: float) -> float:
        place = depth * (len(self.points) - 1)
        low = min(int(place), len(self.points) - 2) if len(self.points) > 1 else 0
        high = min(low + 1, len(self.points) - 1)
        return self.points[low] + (place - low) * (self.points[high] - self.points[low])


@dataclass(frozen=True)
class PerKind:
    """A number for each kind of weight (q_proj, down_proj, ...), 1 for kinds not named, averaging
    to 1.
    """

    kinds: Mapping[str, float]

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        present = {weight.kind for weight in weights}
        for kind in self.kinds:
            if kind not in present:
                raise OptionError(
                    f"layers: no target weight of kind '{kind}'; {nearest(kind, present)}"
                )
        return _average_one(
            {weight.name: float(self.kinds.get(weight.kind, 1.0)) for weight in weights}
        )


@dataclass(frozen=True)
class PerBlock:
    """Another way, with each block's weights sharing the mean of their coefficients."""

    how: Any

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        single = self.how.coefficients(norms, weights)
        blocks: dict[int | None, list[float]] = {}
        for weight in weights:
            blocks.setdefault(weight.layer, []).append(single[weight.name])
        return {
            weight.name: sum(blocks[weight.layer]) / len(blocks[weight.layer]) for weight in weights
        }


def from_option(value: Any, *, tau: float | None = None, per: str = "weight") -> Any:
    """The way that an option describes: a name, a number list over depth ([1, 0.5] or '1,0.5'), or
    a map of kinds. Raises OptionError otherwise.
    """
    how: Any
    if isinstance(value, str) and value and (value[0].isdigit() or value[0] == "."):
        value = [part for part in value.split(",") if part]
    if isinstance(value, str):
        if value not in LAYERS:
            raise OptionError(f"unknown layers '{value}'; {nearest(value, LAYERS)}")
        how = {
            "uniform": Uniform(),
            "softmax": Softmax(1e-8 if tau is None else tau),
            "scale-free": ScaleFree(1.0 if tau is None else tau),
        }[value]
    elif isinstance(value, Mapping):
        how = PerKind({str(kind): _number(number) for kind, number in value.items()})
    elif isinstance(value, Sequence) and value:
        how = OverDepth(tuple(_number(number) for number in value))
    else:
        raise OptionError(
            f"layers expects one of {', '.join(LAYERS)}, a list of numbers or a map of kinds, "
            f"found {value!r}"
        )
    return PerBlock(how) if per == "block" else how


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OptionError(f"layers: expected a number, found {value!r}") from None
    if not (math.isfinite(number) and number >= 0):
        raise OptionError(f"layers: coefficients must be finite and not negative, found {number}")
    return number
