"""How the experiments draw: matplotlib without a screen, ink that follows the colour scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, PALE = "#24292f", "#d0d7df"  # text and axes; grid


def pyplot(salt: str) -> Any:
    """matplotlib.pyplot, set up; `salt` makes the names inside an SVG the same every time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.edgecolor": INK,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path) -> None:
    """Write a figure without a ground of its own; an SVG follows the reader's colour scheme."""
    from matplotlib import pyplot as found

    figure.savefig(path, transparent=True, metadata={"Date": None})
    found.close(figure)
    if path.suffix == ".svg":
        style = (
            "<style>:root{--ink:#24292f;--pale:#d8dee4}"
            "@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--pale:#30363d}}</style>"
        )
        svg = (
            path.read_text(encoding="utf-8")
            .replace(INK, f"var(--ink,{INK})")
            .replace(PALE, f"var(--pale,{PALE})")
        )
        path.write_text(svg.replace("<defs>", f"{style}<defs>", 1), encoding="utf-8")
