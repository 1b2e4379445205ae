"""Writes the results of frontier.py as docs/quality.md and docs/quality.svg.

They show forgetting at 50, 80 and 95 % of plain fine-tuning's learning, and the frontiers. Only the
result files are read. A run is a curve: its finished update scaled by 0.25, 0.5, 0.75 and 1,
between which forgetting is interpolated. On the validation part a method's number is the least over
its settings, one seed each. On the test part one setting was chosen before, and its error is that
of the mean over seeds. Plain's learning is the most that it learns at any learning rate, in the
same part.

    python experiments/quality.py out/frontier/results docs
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from drawing import PALE, pyplot, save

SHARES = (0.5, 0.8, 0.95)
Curve = list[tuple[float, float]]  # (learning, forgetting), from (0, 0) on
Runs = dict[float | str, list[Curve]]  # setting -> one curve per seed

# method of frontier.py (before "@": the same at another learning rate) -> name, colour where it is
# drawn (Okabe and Ito's)
METHODS: dict[str, tuple[str, str | None]] = {
    "plain": ("plain LoRA", "#8c8c8c"),
    "uniform": ("uniform (L2 to the base)", "#cc79a7"),
    "paper": ("the paper's preset", "#d55e00"),
    "path": ("path integral", "#b8860b"),
    "path-factored": ("path integral, from sums of rows and columns", None),
    "fisher": ("diagonal Fisher", "#e69f00"),
    "fisher-u8": ("diagonal Fisher, u8", None),
    "fisher-u4": ("diagonal Fisher, u4", None),
    "fisher-factored": ("diagonal Fisher, factored", None),
    "fisher-sampled": ("diagonal Fisher, sampled labels", None),
    "activation": ("activation", None),
    "shuffled": ("diagonal Fisher, shuffled", None),
    "kronecker": ("Kronecker, whole", "#56b4e9"),
    "kronecker-sampled": ("Kronecker, whole, sampled labels", None),
    "default": ("Kronecker, rank 16", "#0072b2"),
    "default32": ("Kronecker, rank 32", None),
    "default64": ("Kronecker, rank 64", "#009e73"),
    "default-half": ("Kronecker, rank 16, 1/2 of the text", None),
    "default-eighth": ("Kronecker, rank 16, 1/8 of the text", None),
    "default-32nd": ("Kronecker, rank 16, 1/32 of the text", None),
    "default-self": ("Kronecker, rank 16, text from the model itself", None),
    "default-sampled": ("Kronecker, rank 16, sampled labels", None),
    "kl": ("KL to the base on general text", "#7d7df0"),
    "default+kl": ("rank 16 and KL", None),
}


def load(folder: Path) -> dict[tuple[str, str], dict[str, Runs]]:
    """(part, domain) -> method -> setting -> curves."""
    found: dict[tuple[str, str], dict[str, Runs]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        method, _, rate = result["method"].partition("@")
        setting = f"{result['value']:g}" + (f" at rate {rate}" if rate else "")
        found[result["part"], result["domain"]][method][setting].append(curve(result["scales"]))
    return found


def curve(scales: dict[str, Any]) -> Curve:
    return [(0.0, 0.0)] + [
        (scales[s]["learning"]["nats"], scales[s]["forgetting"]["nats"])
        for s in sorted(scales, key=float)
    ]


def forgetting(points: Curve, wanted: float) -> float | None:
    """Where the curve first reaches the wanted learning; None where it does not."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < wanted <= x1:
            return y0 + (y1 - y0) * (wanted - x0) / (x1 - x0)
    return None


def most(runs: Runs) -> float:
    """What a method learns at full size, mean over seeds, at its best setting."""
    return max(statistics.mean(points[-1][0] for points in curves) for curves in runs.values())


def best(runs: Runs, wanted: float) -> tuple[float, str] | None:
    """(least mean forgetting over settings whose seeds all reach it, that setting)."""
    reached = [
        (statistics.mean(values), str(setting))
        for setting, curves in runs.items()
        if None not in (values := [forgetting(points, wanted) for points in curves])
    ]
    return min(reached, default=None)


def validation_table(methods: dict[str, Runs]) -> list[str]:
    """Best of the settings tried, at each share."""
    lines = [
        "| method | settings | forgetting at 50 % | 80 % | 95 % of plain's learning | against "
        "plain at 95 % |",
        "|---|---|---|---|---|---|",
    ]
    wanted = [share * most(methods["plain"]) for share in SHARES]
    reference = best(methods["plain"], wanted[-1])
    for method in ordered(methods):
        found = [best(methods[method], x) for x in wanted]
        cells = ["not reached" if each is None else f"{each[0]:.4f} ({each[1]})" for each in found]
        ratio = f"{found[-1][0] / reference[0]:.2f}x" if found[-1] and reference else ""
        lines.append(f"| {name(method)} | {len(methods[method])} | {' | '.join(cells)} | {ratio} |")
    return lines


def test_table(methods: dict[str, Runs]) -> list[str]:
    """Chosen settings on fresh seeds, with the error of the mean."""
    lines = [
        "| method | setting | seeds | forgetting at 50 % | 80 % | 95 % of plain's learning |",
        "|---|---|---|---|---|---|",
    ]
    wanted = [share * most(methods["plain"]) for share in SHARES]
    for method in ordered(methods):
        for setting, curves in methods[method].items():
            cells = " | ".join(
                over_seeds([forgetting(points, x) for points in curves]) for x in wanted
            )
            lines.append(f"| {name(method)} | {setting} | {len(curves)} | {cells} |")
    return lines


def over_seeds(values: list[float | None]) -> str:
    reached = [value for value in values if value is not None]
    if len(reached) < len(values):
        return f"reached by {len(reached)} of {len(values)}" if reached else "not reached"
    error = f" ± {statistics.stdev(reached) / len(reached) ** 0.5:.4f}" if len(reached) > 1 else ""
    return f"{statistics.mean(reached):.4f}{error}"


def ordered(methods: dict[str, Runs]) -> list[str]:
    known = [method for method in METHODS if method in methods]
    return known + sorted(set(methods) - set(known))


def name(method: str) -> str:
    return METHODS.get(method, (method, None))[0]


def draw(found: dict[tuple[str, str], dict[str, Runs]], path: Path) -> None:
    """One panel per domain: the least forgetting over settings for every share of plain's learning,
    methods labelled where their lines end.
    """
    domains = sorted(domain for part, domain in found if part == "validation")
    figure, axes = pyplot("quality").subplots(
        1, len(domains), figsize=(6.0 * len(domains), 4.8), sharey=True, squeeze=False
    )
    for axis, domain in zip(axes[0], domains, strict=True):
        panel(axis, domain, found["validation", domain])
    axes[0][0].set_ylabel("forgetting, nats per token (less is better)")
    figure.tight_layout(w_pad=1.0)
    save(figure, path)


def panel(axis: Any, domain: str, methods: dict[str, Runs]) -> None:
    """One domain."""
    plain = most(methods["plain"])
    ends = []
    for method in ordered(methods):
        colour = METHODS.get(method, ("", None))[1]
        if colour is None:
            continue
        points = [
            (100 * share, value[0])
            for share in (i / 100 for i in range(40, 111))
            if (value := best(methods[method], share * plain))
        ]
        if not points:
            continue
        ours = method.startswith("default")
        axis.plot(
            *zip(*points, strict=True),
            color=colour,
            linewidth=2.6 if ours else 1.6,
            linestyle="--" if method == "plain" else "-",
            zorder=3 if ours else 2,
            solid_capstyle="round",
        )
        axis.plot(*points[-1], "o", color=colour, markersize=5 if ours else 3.5, zorder=4)
        if points[-1][0] < 90:  # far from the names at the right
            axis.annotate(
                name(method),
                points[-1],
                xytext=(6, 0),
                textcoords="offset points",
                color=colour,
                fontsize=9.5,
                va="center",
            )
        else:
            ends.append((*points[-1], name(method), colour, ours))
    axis.set(
        yscale="log",
        xlim=(40, 112),
        ylim=(8e-4, 1.0),
        title=domain,
        xlabel="learning, % of the most that plain LoRA learns",
    )
    axis.set_xticks((40, 50, 60, 70, 80, 90, 100))
    axis.set_yticks((0.001, 0.01, 0.1), ("0.001", "0.01", "0.1"))
    axis.minorticks_off()
    axis.grid(True, color=PALE, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    label(axis, ends)


def label(axis: Any, ends: list[tuple[float, float, str, str, bool]]) -> None:
    """Names right of the panel, top to bottom as the lines end, kept apart, each tied to its line
    by a thin one.
    """
    gap, top = 0.19, -0.08  # powers of ten
    ends = sorted(ends, key=lambda end: end[1])
    heights = [math.log10(y) for _, y, *_ in ends]
    for _ in range(200):  # neighbours that are too close push each other apart
        for i in range(len(heights) - 1):
            lacking = gap - (heights[i + 1] - heights[i])
            if lacking > 0:
                heights[i], heights[i + 1] = heights[i] - lacking / 2, heights[i + 1] + lacking / 2
        heights[-1] = min(heights[-1], top)
    for (x, y, text, colour, ours), height in zip(ends, heights, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(114, 10**height),
            color=colour,
            fontsize=9.5,
            fontweight="bold" if ours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def page(found: dict[tuple[str, str], dict[str, Runs]]) -> str:
    """docs/quality.md."""
    lines = [
        "# Forgetting at equal learning",
        "",
        "Written by `python experiments/quality.py out/frontier/results docs` from the runs of "
        "[frontier.py](../experiments/frontier.py), whose "
        "protocol it follows: a small language model, LoRA of rank 8, 120 steps. Forgetting is "
        "the rise of the loss on general text, learning the fall "
        "of the loss on the domain, both in nats per token. Finished updates scaled by 0.25, 0.5 "
        "and 0.75 belong to every method, plain included.",
        "",
        "![Learning against forgetting per domain; a line is the least forgetting over a "
        "method's settings and scales](quality.svg)",
        "",
    ]
    for part, title, table in (
        ("validation", "exploration: best of the settings, one seed", validation_table),
        ("test", "fresh seeds at chosen settings", test_table),
    ):
        for domain in sorted(domain for which, domain in found if which == part):
            methods = found[part, domain]
            if "plain" in methods:
                lines += [f"## {domain}, {title}", "", *table(methods), ""]
    lines += [
        "In brackets: the setting, a learning rate for plain, a strength for pulls, a weight for "
        "KL; 'at rate': not at the rate that is best for plain. "
        "Under exploration the best of several settings is shown, which flatters methods with "
        "more of them, and differences of single seeds below about "
        "0.01 nats at 95 % are noise."
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("docs", type=Path)
    parser.add_argument("--png", type=Path, help="also draw it here")
    given = parser.parse_args()
    found = load(given.results)
    (given.docs / "quality.md").write_text(page(found), encoding="utf-8")
    draw(found, given.docs / "quality.svg")
    if given.png:
        draw(found, given.png)


if __name__ == "__main__":
    main()
