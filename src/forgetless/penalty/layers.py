"""Layer coefficients c_l: how much of the strength each target weight gets.

Each rule is a frozen dataclass with one function, `coefficients(norms, weights)`, which makes name
-> c_l of the Frobenius norm of each weight's importance and of the weights themselves. The
coefficients average to 1, so that strength keeps its meaning, except those of the paper's softmax,
which sum to 1 (arXiv 2501.13669).

    Penalty(model, importance, strength=1.0, layers=OverDepth((1.0, 0.5)))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forgetless.errors import OptionError, nearest
from forgetless.options.tune import LAYERS


class Placed(Protocol):
    """What a rule reads of a weight."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def kind(self) -> str: ...


Coefficients = dict[str, float]


class LayerRule(Protocol):
    """A rule that gives each target weight its coefficient."""

    def coefficients(
        self, norms: Mapping[str, float], weights: Sequence[Placed]
    ) -> Coefficients: ...


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
    """softmax(tau * ||Omega_l|| / mean norm), averaging to 1.

    The unit of importance no longer matters, so that tau near 1 does something.
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
    """A number for each kind of weight (q_proj, down_proj, ...), averaging to 1.

    Kinds that are not named get 1 before averaging.
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
    """Another rule, whose coefficients are averaged over the weights of each block."""

    rule: LayerRule

    def coefficients(self, norms: Mapping[str, float], weights: Sequence[Placed]) -> Coefficients:
        single = self.rule.coefficients(norms, weights)
        blocks: dict[int | None, list[float]] = {}
        for weight in weights:
            blocks.setdefault(weight.layer, []).append(single[weight.name])
        return {
            weight.name: sum(blocks[weight.layer]) / len(blocks[weight.layer]) for weight in weights
        }


def from_option(value: Any, *, tau: float | None = None, per: str = "weight") -> LayerRule:
    """The rule that an option describes.

    It is a name, a list of numbers over depth ([1, 0.5] or '1,0.5'), or a map of kinds to numbers.
    `per` "block" averages the coefficients over each block. Raises OptionError otherwise.
    """
    if isinstance(value, str) and value and (value[0].isdigit() or value[0] == "."):
        value = [number for number in value.split(",") if number]
    if isinstance(value, str):
        rule = _named_rule(value, tau)
    elif isinstance(value, Mapping):
        rule = PerKind({str(kind): _coefficient(number) for kind, number in value.items()})
    elif isinstance(value, Sequence) and value:
        rule = OverDepth(tuple(_coefficient(number) for number in value))
    else:
        raise OptionError(
            f"layers expects one of {', '.join(LAYERS)}, a list of numbers or a map of kinds, "
            f"found {value!r}"
        )
    return PerBlock(rule) if per == "block" else rule


def _named_rule(name: str, tau: float | None) -> LayerRule:
    if name not in LAYERS:
        raise OptionError(f"unknown layers '{name}'; {nearest(name, LAYERS)}")
    rules: dict[str, LayerRule] = {
        "uniform": Uniform(),
        "softmax": Softmax() if tau is None else Softmax(tau),
        "scale-free": ScaleFree() if tau is None else ScaleFree(tau),
    }
    return rules[name]


def _coefficient(value: Any) -> float:
    """A coefficient that an option gives. Raises OptionError for what is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OptionError(f"layers: expected a number, found {value!r}") from None
    if not (math.isfinite(number) and number >= 0):
        raise OptionError(f"layers: coefficients must be finite and not negative, found {number}")
    return number
