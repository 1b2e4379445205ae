"""One colour, symbol and dash per method, the same in every figure and legible in both themes.

Eight hues that differ for the common kinds of colour blindness too (after Okabe and Ito, arranged
so that neighbours differ most), each as a pair for light and dark ground with a contrast of at
least 3 : 1 against it. With more than eight methods the hues come round again with another symbol
and dash, so that colour is never the only difference. hold has the accent, plain the neutral grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forgetless.files.compare_json import ComparedMethod

# The grounds, as in page.css.
LIGHT, DARK = "#ffffff", "#14171a"
# The colours of hold and of plain, for the light and for the dark ground.
ACCENT = ("#0a66b7", "#5db2f7")
NEUTRAL = ("#626d78", "#a3afba")
# The colours of all other methods, in the order in which they are given out.
HUES = (
    ("#b8540b", "#f0a04f"),
    ("#00806a", "#3fcdb0"),
    ("#a83d92", "#e58fd3"),
    ("#8c6f00", "#e0c64e"),
    ("#5a4fc4", "#aea4fa"),
    ("#a92f35", "#f58585"),
    ("#4c7a12", "#a2d45e"),
    ("#00778f", "#5ccbe3"),
)
SYMBOLS = (
    "square",
    "diamond",
    "triangle-up",
    "cross",
    "star",
    "hexagon",
    "triangle-down",
    "bowtie",
)
# The symbols for keys and tables, in a box of 12 by 12.
PATHS = {
    "circle": "M6 1a5 5 0 1 0 .01 0z",
    "square": "M1.5 1.5h9v9h-9z",
    "diamond": "M6 0l6 6-6 6-6-6z",
    "triangle-up": "M6 1l5.5 10H.5z",
    "cross": "M4 1h4v3h3v4H8v3H4V8H1V4h3z",
    "star": "M6 0l1.6 4.2 4.4.2-3.5 2.8L9.7 11.6 6 9.1l-3.7 2.5 1.2-4.4L0 4.4l4.4-.2z",
    "hexagon": "M3 .8h6L12 6l-3 5.2H3L0 6z",
    "triangle-down": "M6 11L.5 1h11z",
    "bowtie": "M1 1l10 10V1L1 11z",
}
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    light: str
    dark: str
    symbol: str
    dash: str


def looks(methods: Sequence[ComparedMethod], reference: str = "plain") -> dict[str, Look]:
    """Method name -> its look, in the order of the comparison.

    The first method of the family hold gets the accent, plain fine-tuning the grey.
    """
    held = [method.name for method in methods if method.family == "hold"]
    first = "hold" if "hold" in held else (held[0] if held else "hold")
    by_name: dict[str, Look] = {}
    others = 0
    for method in methods:
        if method.name == first:
            by_name[method.name] = Look(*ACCENT, "circle", "solid")
        elif method.name == reference:
            by_name[method.name] = Look(*NEUTRAL, "circle", "solid")
        else:
            by_name[method.name] = _other(others)
            others += 1
    return by_name


def _other(number: int) -> Look:
    """The look of a method that is neither ours nor plain; numbers count from 0."""
    turn = number // len(HUES)
    return Look(
        *HUES[number % len(HUES)],
        SYMBOLS[(number + turn) % len(SYMBOLS)],
        DASHES[turn % len(DASHES)],
    )
