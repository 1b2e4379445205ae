"""Draws a finished comparison as one figure, docs/compare.svg.

It shows what every method forgets at 80 % of plain fine-tuning's learning, a panel per domain, with
the least first. Only compare.json is read. Dots are means over seeds, lines their standard errors;
methods that did not reach that learning are named below.

    python experiments/bars.py experiments/lab/compare.json docs/compare.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from drawing import INK, PALE, pyplot, save

# The part of plain's learning at which methods are compared: nearly every method reaches it in
# every seed, while only some reach 95 % of what plain learns at its best rate.
LEVEL = 0.8
# The axis of forgetting begins here, in nats per token.
FLOOR = 1e-3
OURS, PLAIN, OTHERS = "#0072b2", "#8c8c8c", "#b06a2c"


def rows(comparison: dict[str, Any], domain: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(methods that reached the learning, least forgetting first; those that did not) on the text
    of the recorded kind.
    """
    recorded = next(text["name"] for text in comparison["texts"] if text["kind"] == "recorded")
    found = [
        row
        for row in comparison["equal_learning"][domain][recorded]
        if row["share"] == LEVEL and row["seeds"]
    ]
    reached = [row for row in found if row["forgetting"] is not None]
    return sorted(reached, key=lambda row: row["forgetting"]), [
        row["method"] for row in found if row["forgetting"] is None
    ]


def draw(comparison: dict[str, Any], path: Path) -> None:
    """The figure, as SVG that follows the reader's colour scheme, or PNG."""
    domains = [domain["name"] for domain in comparison["domains"]]
    longest = max(len(rows(comparison, domain)[0]) for domain in domains)
    figure, axes = pyplot("bars").subplots(
        1, len(domains), figsize=(5.6 * len(domains), 1.5 + 0.24 * longest), squeeze=False
    )
    families = {method["name"]: method["family"] for method in comparison["methods"]}
    for axis, domain in zip(axes[0], domains, strict=True):
        panel(axis, domain, *rows(comparison, domain), families, longest)
    figure.tight_layout(w_pad=2.0)
    save(figure, path)


def panel(
    axis: Any,
    domain: str,
    reached: list[dict[str, Any]],
    missed: list[str],
    families: dict[str, str],
    longest: int,
) -> None:
    """One domain."""
    for place, row in enumerate(reached):
        ours = families.get(row["method"]) == "hold"
        colour = OURS if ours else PLAIN if row["method"] == "plain" else OTHERS
        least = max(row["forgetting"], FLOOR)
        axis.plot([FLOOR, least], [place, place], color=PALE, linewidth=0.8, zorder=1)
        if error := row["standard_error"]:
            axis.plot(
                [max(least - error, FLOOR), least + error],
                [place, place],
                color=colour,
                linewidth=2.2,
                zorder=2,
                solid_capstyle="round",
            )
        axis.plot(least, place, "o", color=colour, markersize=6 if ours else 5, zorder=3)
        axis.annotate(
            f"{row['forgetting']:.4f}",
            (least + (error or 0), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axis.set_yticks(range(len(reached)), [row["method"] for row in reached])
    for text, row in zip(axis.get_yticklabels(), reached, strict=True):
        ours = families.get(row["method"]) == "hold"
        text.set_color(OURS if ours else INK)
        text.set_fontweight("bold" if ours else "normal")
    axis.set(
        xscale="log",
        xlim=(FLOOR, 1.6),
        ylim=(longest - 0.4, -0.6),
        title=domain,
        xlabel="forgetting, nats per token (less is better)",
    )
    axis.set_xticks((0.001, 0.01, 0.1, 1), ("0.001", "0.01", "0.1", "1"))
    axis.minorticks_off()
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    if missed:
        axis.annotate(
            "not reached: " + ", ".join(missed),
            (0, 0),
            xytext=(0, -38),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8.5,
            va="top",
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path)
    parser.add_argument("figure", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.comparison.read_text(encoding="utf-8")), given.figure)


if __name__ == "__main__":
    main()
