"""Numbers as people read them. A missing number is an en dash, never a placeholder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# An en dash, which the page reads out as "not measured".
MISSING = "\u2013"
TIMES = "\u00d7"


def finite(value: Any) -> float | None:
    """`value` as a finite float; None where it is missing or no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def nats(value: Any, error: Any = None, *, digits: int | None = None) -> str:
    """'0.056 ± 0.002'; the error only where there is one.

    One digit more below 0.01, where methods that forget little differ.
    """
    number, spread = finite(value), finite(error)
    if number is None:
        return MISSING
    if digits is None:
        digits = 4 if 0 < abs(number) < 0.01 else 3
    rounded = f"{number:.{digits}f}"
    if float(rounded) == 0:
        rounded = rounded.removeprefix("-")
    return rounded if spread is None else f"{rounded} ± {spread:.{digits}f}"


def accuracy(value: Any, error: Any = None) -> str:
    """'84.5 % ± 0.4 %'."""
    number, spread = finite(value), finite(error)
    if number is None:
        return MISSING
    return f"{100 * number:.1f} %" + ("" if spread is None else f" ± {100 * spread:.1f} %")


def perplexity_percent(nats: float) -> float:
    """A rise of the loss in nats per token, as a rise of perplexity in percent."""
    return 100 * math.expm1(nats)


def percent(value: float) -> str:
    """A fraction that people chose, without needless digits: 0.95 -> '95 %'."""
    return f"{100 * value:g} %"


def byte_size(value: Any) -> str:
    """Bytes in the unit that suits them."""
    number = finite(value)
    if number is None:
        return MISSING
    for unit, step in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return f"{number:.0f} B"


def duration(value: Any) -> str:
    """Seconds as '48 s', '3 min 20 s', '2 h 5 min'."""
    number = finite(value)
    if number is None:
        return MISSING
    seconds = round(number)
    if seconds < 60:
        return f"{number:.0f} s" if number >= 10 else f"{number:.2g} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def integer(value: Any) -> str:
    """'78,848'."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def shown(value: Any) -> str:
    """Any plain value on one line: numbers short, lists with commas, mappings as 'key: value', None
    and '' as missing.
    """
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) or MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or MISSING
    return str(value)


def exact(value: float) -> str:
    """The whole number behind what is shown, for sorting and CSV."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def settings(values: Mapping[str, Any] | None) -> str:
    """'learning rate 0.004, strength 10': the settings that say something."""
    telling = {
        key: value for key, value in (values or {}).items() if value not in (None, "", False)
    }
    return ", ".join(f"{key.replace('_', ' ')} {shown(value)}" for key, value in telling.items())
