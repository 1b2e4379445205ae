"""What all figures share. A figure is traces and a layout: plain dicts, with the names that Plotly
gave them, drawn by charts.js; page.js brings the theme's colours and the method toggles.

A trace carries `meta`, the method it belongs to (None: always shown), `head`, which stands above
each of its `hovertext` (a large comparison would repeat it ten thousand times), and its colours as
"light|dark" pairs that page.js resolves. Text from data and models is escaped here, since
charts.js reads <b> and <br> in what appears on hovering, all of which is made here, never by a
template.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from forgetless.report.palette import ACCENT, NEUTRAL, Look

# A part of a trace or layout, such as an axis or a note; a trace; traces with their layout.
FigurePart = dict[str, Any]
Trace = FigurePart
Figure = FigurePart
Looks = Mapping[str, Look]
# The colours of what belongs to no method.
OUR_COLOURS, GREY_COLOURS = "|".join(ACCENT), "|".join(NEUTRAL)
# The look of a line that marks a value.
DOTTED = {"width": 1, "dash": "dot"}


def safe(value: Any, limit: int = 90) -> str:
    """Text that a figure shows as it is, cut to `limit` characters."""
    words = " ".join(str(value).split())
    return html.escape(words if len(words) <= limit else words[: limit - 1] + "…", quote=False)


def pair(look: Look) -> str:
    """The colours of a method in both themes."""
    return f"{look.light}|{look.dark}"


def axis(title: str, **more: Any) -> FigurePart:
    """An axis with a title."""
    return {"title": {"text": title}, **more}
