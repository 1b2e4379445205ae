"""The demo's table and picture: one row for each state of the model, means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from forgetless.demo.result import STATES, Seed
from forgetless.files.atomic import atomic_path

# The titles of the table's columns.
HEAD = (
    "",
    "general accuracy",
    "general loss",
    "domain accuracy",
    "domain loss",
    "seconds",
    "setting",
)
# The panels of the picture: a title, and the field of a row that its bars show.
BAR_PANELS = (
    ("general accuracy: what it still knows", "general_accuracy"),
    ("domain accuracy: what it learned", "domain_accuracy"),
    ("general loss (nats per token)", "general_loss"),
)
# The colour of each state's bars.
BAR_COLOURS = ("#9aa5b1", "#d1495b", "#e8a87c", "#edae49", "#2e86ab")


def demo_table(seeds: Sequence[Seed]) -> str:
    """A markdown table, mean over seeds ± standard error where there are several."""
    rows = [HEAD]
    for name in STATES:
        states = [seed[name] for seed in seeds]
        rows.append(
            (
                name,
                cell([state.general_accuracy for state in states], "%"),
                cell([state.general_loss for state in states]),
                cell([state.domain_accuracy for state in states], "%"),
                cell([state.domain_loss for state in states]),
                cell([state.seconds for state in states], "s"),
                "; ".join(sorted({state.setting for state in states})),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = []
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def cell(values: Sequence[float | None], unit: str = "") -> str:
    """Mean ± standard error; '-' where there is no number."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    show = {"%": "{:.1%}", "s": "{:.0f}"}.get(unit, "{:.3f}").format
    mean = show(statistics.mean(known))
    if len(known) == 1 or unit == "s":
        return mean
    return f"{mean} ± {show(statistics.stdev(known) / len(known) ** 0.5)}"


def plot(seeds: Sequence[Seed], path: Path) -> Path | None:
    """Bars of general and domain accuracy and of general loss, one for each row of the table.

    None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    for axis, (title, field) in zip(axes, BAR_PANELS, strict=True):
        values = [statistics.mean(getattr(seed[name], field) for seed in seeds) for name in STATES]
        shown = "{:.2f}" if field == "general_loss" else "{:.0%}"
        bars = axis.barh(STATES, values, color=BAR_COLOURS)
        axis.bar_label(bars, [shown.format(value) for value in values], padding=3)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    return path
