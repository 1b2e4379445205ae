"""The figures of a comparison: what methods learn against what they forget, and what they forget
where they have learned the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forgetless.files.compare_json import (
    Comparison,
    EqualLearning,
    FrontierPoint,
    MethodFrontier,
    TrialRun,
)
from forgetless.report import numbers
from forgetless.report.contents import diverges, label, measure_of
from forgetless.report.drawing import (
    DOTTED,
    GREY_COLOURS,
    Figure,
    FigurePart,
    Looks,
    Trace,
    axis,
    pair,
    safe,
)
from forgetless.report.palette import Look
from forgetless.report.summary import equal_rows

# Pixels of height that a bar takes.
PER_BAR = 34


def frontier(contents: Comparison, looks: Looks, domain: str, text: str) -> Figure | None:
    """Learning over forgetting, a line per method through the points of its frontier, the points
    below it faint. None without points.
    """
    methods = (contents.frontier.get(domain) or {}).get(text) or {}
    runs = {run.id: run for run in contents.runs}
    lines = [
        trace
        for method in contents.methods
        if method.name in methods
        for trace in _of_method(
            methods[method.name] or MethodFrontier(),
            method.name,
            label(contents, method.name),
            looks[method.name],
            runs,
        )
    ]
    if not lines:
        return None
    title = f"forgetting: {measure_of(contents, text, safe(text, 40))}, nats per token"
    learning = f"learning: fall of the loss on {safe(domain, 40)}, nats per token"
    layout: FigurePart = {
        "xaxis": axis(title, rangemode="tozero"),
        "yaxis": axis(learning, rangemode="tozero"),
        "shapes": [],
        "annotations": [],
    }
    for level, nats in _levels_in_nats(equal_rows(contents, domain, text)):
        layout["shapes"].append(_level_line(nats))
        layout["annotations"].append(_level_note(level, nats))
    return {
        "traces": [_base_model(), *lines],
        "layout": layout,
        "height": 500,
        "near": _near(lines),
    }


def _base_model() -> Trace:
    """A small cross where nothing is learned and nothing forgotten."""
    cross = {"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": GREY_COLOURS}}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [0],
        "y": [0],
        "hovertext": ["base model"],
        "marker": cross,
        "meta": None,
    }


def _near(lines: Sequence[Trace]) -> list[float]:
    """The part of the forgetting axis that holds the lines; faint points may lie further out."""
    x = [value for trace in lines if "lines" in trace["mode"] for value in trace["x"]] or [0.0]
    first, last = min(*x, 0.0), max(*x, 0.0)
    edge = 0.06 * (last - first)
    return [first - edge, last + 1.5 * edge]


def _levels_in_nats(rows: Sequence[EqualLearning]) -> list[tuple[float, float]]:
    """The levels of learning with what they are in nats."""
    return sorted({(row.level, row.learning_nats) for row in rows if row.learning_nats is not None})


def _level_line(nats: float) -> FigurePart:
    ends = {"x0": 0, "x1": 1, "y0": nats, "y1": nats}
    return {"type": "line", "xref": "paper", **ends, "line": DOTTED}


def _level_note(level: float, nats: float) -> FigurePart:
    return {
        "xref": "paper",
        "x": 1,
        "xanchor": "right",
        "y": nats,
        "yanchor": "bottom",
        "showarrow": False,
        "text": f"{numbers.percent(level)} of plain's learning",
    }


def own_frontier(points: Sequence[FrontierPoint]) -> list[bool]:
    """Which points of one method no other point of it betters; `points` come by rising forgetting.

    (`on_frontier` in compare.json is among all methods.)
    """
    highest, best = -math.inf, []
    for point in points:
        learning = point.learning or 0.0
        best.append(learning > highest)
        highest = max(highest, learning)
    return best


def _of_method(
    curve: MethodFrontier, name: str, shown: str, look: Look, runs: Mapping[Any, TrialRun]
) -> Iterator[Trace]:
    """The faint points of a method below its frontier, and the line through the others."""
    points = sorted(
        (each for each in curve.points if None not in (each.learning, each.forgetting)),
        key=lambda point: (point.forgetting or 0.0, -(point.learning or 0.0)),
    )
    best = own_frontier(points)
    below = [point for point, flag in zip(points, best, strict=True) if not flag]
    if below:
        yield _points_trace(below, name, shown, look, runs, on=False)
    line = [point for point, flag in zip(points, best, strict=True) if flag]
    if line:
        errors = {
            "error_x": _whiskers(line, [point.forgetting_error for point in line], look),
            "error_y": _whiskers(line, [point.learning_error for point in line], look),
        }
        yield _points_trace(line, name, shown, look, runs, on=True) | errors


def _points_trace(
    points: Sequence[FrontierPoint],
    name: str,
    shown: str,
    look: Look,
    runs: Mapping[Any, TrialRun],
    *,
    on: bool,
) -> Trace:
    """Points of a method that are `on` its frontier, joined by a line, or below it."""
    strong = look.dash == "solid" and look.symbol == "circle"  # hold and plain
    return {
        "type": "scatter",
        "mode": "lines+markers" if on else "markers",
        "name": safe(shown),
        "meta": name,
        "x": [point.forgetting for point in points],
        "y": [point.learning for point in points],
        "opacity": 1.0 if on else 0.35,
        "hovertext": [_frontier_hover(point, shown, runs.get(point.run), on) for point in points],
        "line": {"color": pair(look), "width": 3 if strong else 1.75, "dash": look.dash},
        "marker": {"color": pair(look), "symbol": look.symbol, "size": 9 if strong else 8},
    }


def _whiskers(
    points: Sequence[FrontierPoint], errors: Sequence[float | None], look: Look
) -> FigurePart:
    """Standard errors over seeds; a point of one seed has none."""
    array = [
        0 if point.seeds == 1 else error or 0 for point, error in zip(points, errors, strict=True)
    ]
    return {"type": "data", "array": array, "thickness": 1, "width": 0, "color": pair(look)}


def _frontier_hover(point: FrontierPoint, shown: str, run: TrialRun | None, on: bool) -> str:
    update = "whole update"
    if point.scale not in (None, 1.0):
        update = f"update {numbers.TIMES} {point.scale:g}"
    seeds = f", {point.seeds} seed{'s' if point.seeds != 1 else ''}" if point.seeds else ""
    lines = [
        f"<b>{safe(shown)}</b>" + ("" if on else " (below its frontier)"),
        f"learning {numbers.nats(point.learning, point.learning_error)}",
        f"forgetting {numbers.nats(point.forgetting, point.forgetting_error)}",
        update + seeds,
    ]
    if run is not None and run.settings:
        lines.append(safe(numbers.settings(run.settings)))
    if point.on_frontier:
        lines.append("no method here betters it")
    return "<br>".join([*lines, f"run {safe(str(point.run)[:12])}"])


def equal_learning(
    contents: Comparison, looks: Looks, domain: str, text: str, level: float
) -> Figure | None:
    """Bars of forgetting where a method has learned this much of what plain learns, least first;
    methods that do not get there are named as such.
    """
    rows = [row for row in equal_rows(contents, domain, text) if row.level == level]
    rows.sort(key=lambda row: (row.forgetting is None, row.forgetting or 0.0))
    if not rows:
        return None
    names = [safe(label(contents, row.method), 32) for row in rows]
    lost = f"forgetting on {safe(text, 40)}"
    if diverges(contents, text):
        lost = measure_of(contents, text, safe(text, 40))
    return {
        "traces": [
            _bar(row, name, pair(looks[row.method])) for row, name in zip(rows, names, strict=True)
        ],
        "height": 76,
        "per": PER_BAR,
        "order": [[row.method, name] for row, name in zip(rows, names, strict=True)],
        "layout": {
            "xaxis": axis(f"{lost}, nats per token", rangemode="tozero"),
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            "annotations": [_bar_note(row, name) for row, name in zip(rows, names, strict=True)],
        },
    }


def _bar(row: EqualLearning, shown: str, colour: str) -> Trace:
    error = 0 if row.seeds == 1 else row.standard_error or 0
    return {
        "type": "bar",
        "orientation": "h",
        "x": [0 if row.forgetting is None else row.forgetting],
        "y": [shown],
        "meta": row.method,
        "name": shown,
        "width": 0.62,
        "marker": {"color": colour},
        "hovertext": [f"<b>{shown}</b><br>{_bar_words(row)}"],
        "error_x": {"type": "data", "array": [error], "thickness": 1.5, "width": 4},
    }


def _bar_note(row: EqualLearning, shown: str) -> FigurePart:
    """The number beside a bar, or why there is none."""
    return {
        "x": max((row.forgetting or 0) + (row.standard_error or 0), 0),
        "y": shown,
        "text": _bar_words(row),
        "showarrow": False,
        "xanchor": "left",
        "xshift": 8,
        "name": row.method,
    }


def _bar_words(row: EqualLearning) -> str:
    status = str(row.status or "not measured")
    if row.forgetting is None:
        return safe(status)
    words = numbers.nats(row.forgetting, row.standard_error)
    return words if status == "reached" else f"{words} ({safe(status)})"
