"""The figures, as traces and layouts for Plotly: plain dicts, drawn by page.js, which brings the
theme's colours and the method toggles.

A trace carries `meta`, the method it belongs to (None: always shown), and its colours as
"light|dark" pairs that page.js resolves. Text from data and models is escaped here, since Plotly
reads a small HTML of its own. Every text that appears on hovering is made here, never by a
template.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.report import numbers
from forgetless.report.contents import Contents, label, reported_part
from forgetless.report.palette import NEUTRAL, Look
from forgetless.report.summary import equal_rows

Figure = dict[str, Any]
Looks = Mapping[str, Look]
HEAT = "Cividis"  # made for colour-blind eyes
PER_BAR, SEEDS_SHOWN = 34, 3


def safe(value: Any, limit: int = 90) -> str:
    """Text that Plotly shows as it is, cut to `limit` characters."""
    words = " ".join(str(value).split())
    return html.escape(words if len(words) <= limit else words[: limit - 1] + "…", quote=False)


def pair(look: Look) -> str:
    return f"{look.light}|{look.dark}"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def frontier(contents: Contents, looks: Looks, domain: str, text: str) -> Figure | None:
    """Learning over forgetting, a line per method through the points of its frontier, the points
    below it faint. None without points.
    """
    methods = (contents["frontier"].get(domain) or {}).get(text) or {}
    runs = {run.get("id"): run for run in contents["runs"]}
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [0],
            "y": [0],
            "hoverinfo": "text",
            "hovertext": ["base model"],
            "cliponaxis": False,
            "marker": {
                "symbol": "x-thin",
                "size": 9,
                "line": {"width": 2, "color": "|".join(NEUTRAL)},
            },
            "meta": None,
        }
    ]
    for name in [m["name"] for m in contents["methods"] if m["name"] in methods]:
        points = sorted(
            (
                p
                for p in methods[name].get("points") or []
                if None
                not in (numbers.known(p.get("learning")), numbers.known(p.get("forgetting")))
            ),
            key=lambda p: (p["forgetting"], -p["learning"]),
        )
        best = own_frontier(points)
        for on in (False, True):
            some = [point for point, flag in zip(points, best, strict=True) if flag is on]
            if some:
                traces.append(
                    _frontier_trace(some, name, label(contents, name), looks[name], runs, on)
                )
    if len(traces) == 1:
        return None
    layout: dict[str, Any] = {
        "xaxis": axis(
            f"forgetting: rise of the loss on {safe(text, 40)}, nats per token", rangemode="tozero"
        ),
        "yaxis": axis(
            f"learning: fall of the loss on {safe(domain, 40)}, nats per token", rangemode="tozero"
        ),
        "shapes": [],
        "annotations": [],
    }
    levels = {
        (row["share"], numbers.known(row.get("learning_nats")))
        for row in equal_rows(contents, domain, text)
    }
    for share, level in sorted(levels, key=lambda pair: (pair[0], pair[1] or 0.0)):
        if level is not None:
            layout["shapes"].append(
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": level,
                    "y1": level,
                    "line": {"width": 1, "dash": "dot"},
                }
            )
            layout["annotations"].append(
                {
                    "xref": "paper",
                    "x": 1,
                    "xanchor": "right",
                    "y": level,
                    "yanchor": "bottom",
                    "showarrow": False,
                    "text": f"{numbers.percent(share)} of plain's learning",
                }
            )
    near = [x for trace in traces if "lines" in trace["mode"] for x in trace["x"]] or [0.0]
    edge = 0.06 * (max(*near, 0.0) - min(*near, 0.0))
    return {
        "traces": traces,
        "layout": layout,
        "height": 500,
        "near": [min(*near, 0.0) - edge, max(*near, 0.0) + 1.5 * edge],
    }


def own_frontier(points: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which points of one method no other point of it betters; `points` come by rising forgetting.

    (`on_frontier` in compare.json is among all methods.)
    """
    highest, found = -math.inf, []
    for point in points:
        found.append(point["learning"] > highest)
        highest = max(highest, point["learning"])
    return found


def _frontier_trace(
    points: Sequence[Mapping[str, Any]],
    name: str,
    shown: str,
    look: Look,
    runs: Mapping[Any, Mapping[str, Any]],
    on: bool,
) -> dict[str, Any]:
    strong = look.dash == "solid" and look.symbol == "circle"  # forgetless and plain
    error = lambda key: {
        "type": "data",
        "array": [numbers.known(p.get(key)) or 0 for p in points],
        "thickness": 1,
        "width": 0,
        "color": pair(look),
    }
    return {
        "type": "scatter",
        "mode": "lines+markers" if on else "markers",
        "name": safe(shown),
        "meta": name,
        "x": [p["forgetting"] for p in points],
        "y": [p["learning"] for p in points],
        "opacity": 1.0 if on else 0.35,
        "hovertext": [_hover(p, shown, runs.get(p.get("run")), on) for p in points],
        "hoverinfo": "text",
        "line": {"color": pair(look), "width": 3 if strong else 1.75, "dash": look.dash},
        "marker": {"color": pair(look), "symbol": look.symbol, "size": 9 if strong else 8},
        **(
            {"error_x": error("forgetting_error"), "error_y": error("learning_error")} if on else {}
        ),
    }


def _hover(point: Mapping[str, Any], shown: str, run: Mapping[str, Any] | None, on: bool) -> str:
    scale, seeds = numbers.known(point.get("scale")), point.get("seeds")
    lines = [
        f"<b>{safe(shown)}</b>" + ("" if on else " (below its frontier)"),
        f"learning {numbers.nats(point['learning'], point.get('learning_error'))}",
        f"forgetting {numbers.nats(point['forgetting'], point.get('forgetting_error'))}",
        ("whole update" if scale in (None, 1.0) else f"update {numbers.TIMES} {scale:g}")
        + (f", {seeds} seed{'s' if seeds != 1 else ''}" if seeds else ""),
    ]
    lines += [safe(numbers.settings(run.get("settings")))] if run and run.get("settings") else []
    lines += ["no method here betters it"] if point.get("on_frontier") else []
    return "<br>".join([*lines, f"run {safe(str(point.get('run'))[:12])}"])


def equal_learning(
    contents: Contents, looks: Looks, domain: str, text: str, share: float
) -> Figure | None:
    """Bars of forgetting where a method has learned this share of what plain learns, least first;
    methods that do not get there are named as such.
    """
    rows = [row for row in equal_rows(contents, domain, text) if row["share"] == share]
    rows.sort(
        key=lambda row: (numbers.known(row.get("forgetting")) is None, row.get("forgetting") or 0.0)
    )
    traces: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for row in rows:
        name, value, error = (
            row["method"],
            numbers.known(row.get("forgetting")),
            numbers.known(row.get("standard_error")),
        )
        shown, status = safe(label(contents, name), 32), str(row.get("status") or "not measured")
        words = (
            safe(status)
            if value is None
            else numbers.nats(value, error) + ("" if status == "reached" else f" ({safe(status)})")
        )
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": [value if value is not None else 0],
                "y": [shown],
                "meta": name,
                "name": shown,
                "width": 0.62,
                "marker": {"color": pair(looks[name])},
                "hoverinfo": "text",
                "hovertext": [f"<b>{shown}</b><br>{words}"],
                "error_x": {"type": "data", "array": [error or 0], "thickness": 1.5, "width": 4},
            }
        )
        notes.append(
            {
                "x": max((value or 0) + (error or 0), 0),
                "y": shown,
                "text": words,
                "showarrow": False,
                "xanchor": "left",
                "xshift": 8,
                "name": name,
            }
        )
    if not rows:
        return None
    return {
        "traces": traces,
        "height": 76,
        "per": PER_BAR,
        "order": [[row["method"], safe(label(contents, row["method"]), 32)] for row in rows],
        "layout": {
            "xaxis": axis(f"forgetting on {safe(text, 40)}, nats per token", rangemode="tozero"),
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            "annotations": notes,
            "barmode": "overlay",
        },
    }


def shown_runs(contents: Contents, domain: str) -> list[Mapping[str, Any]]:
    """The finished runs that stand for the methods of a domain: the chosen ones of the reported
    part, else all of it; a few seeds each.
    """
    part = reported_part(contents)
    runs = [
        run
        for run in contents["runs"]
        if run.get("domain") == domain
        and run.get("part", part) == part
        and run.get("status", "done") == "done"
    ]
    chosen = [run for run in runs if run.get("chosen")] or runs
    counted: dict[str, int] = {}
    kept = []
    for run in sorted(chosen, key=lambda run: numbers.known(run.get("seed")) or 0):
        counted[run["method"]] = counted.get(run["method"], 0) + 1
        if counted[run["method"]] <= SEEDS_SHOWN:
            kept.append(run)
    return kept


def curves(contents: Contents, looks: Looks, domain: str) -> Figure | None:
    """Loss, energy and strength over the steps of training, one panel each where any run logged it,
    a line per run.
    """
    runs = [run for run in shown_runs(contents, domain) if run.get("log")]
    names = {"loss": "loss", "energy": "energy", "strength": "strength"}
    panels = [
        key
        for key in names
        if any(numbers.known(entry.get(key)) is not None for run in runs for entry in run["log"])
    ]
    traces = []
    for row, key in enumerate(panels, 1):
        for run in runs:
            found = [
                (entry["step"], entry[key])
                for entry in run["log"]
                if None not in (numbers.known(entry.get(key)), numbers.known(entry.get("step")))
            ]
            if found:
                look, shown = looks[run["method"]], safe(label(contents, run["method"]))
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "x": [x for x, _ in found],
                        "y": [y for _, y in found],
                        "meta": run["method"],
                        "name": shown,
                        "xaxis": "x",
                        "yaxis": f"y{row}" if row > 1 else "y",
                        "line": {"color": pair(look), "width": 1.75, "dash": look.dash},
                        "opacity": 0.85,
                        "hoverinfo": "text",
                        "hovertext": [
                            f"<b>{shown}</b>, seed {run.get('seed')}<br>step {x:g}: {names[key]} "
                            f"{y:.4g}"
                            for x, y in found
                        ],
                    }
                )
    if not traces:
        return None
    gap, layout = (
        0.09,
        {"xaxis": axis("optimizer step", anchor=f"y{len(panels)}" if len(panels) > 1 else "y")},
    )
    tall = (1 - gap * (len(panels) - 1)) / len(panels)
    for row, key in enumerate(panels):
        top = 1 - row * (tall + gap)
        title = f"{names[key]}, nats" if key != "strength" else "strength"
        values = [
            y
            for trace in traces
            if trace["yaxis"] == (f"y{row + 1}" if row else "y")
            for y in trace["y"]
        ]
        wide = (
            key == "energy" and min(values) > 0 and max(values) > 100 * min(values)
        )  # importance of different units side by side
        layout["yaxis" + (str(row + 1) if row else "")] = axis(
            title,
            domain=[max(0.0, top - tall), top],
            type="log" if wide else "linear",
            rangemode="normal" if wide or key == "loss" else "tozero",
        )
    return {"traces": traces, "layout": layout, "height": 90 + 190 * len(panels)}


def heat_map(item: Mapping[str, Any]) -> Figure | None:
    """Importance per layer and kind of weight as log10 of the norm; beside it the layer
    coefficients where they are known.
    """
    weights = [w for w in item.get("weights") or [] if numbers.known(w.get("norm")) is not None]
    if not weights:
        return None
    place = lambda layer: "outside" if layer is None else str(layer)
    layers = [
        place(layer)
        for layer in sorted(
            {w.get("layer") for w in weights}, key=lambda layer: (layer is None, layer or 0)
        )
    ]
    kinds = list(dict.fromkeys(str(w.get("kind")) for w in weights))
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for w in weights:
        cells.setdefault((place(w.get("layer")), str(w.get("kind"))), []).append(w)
    norm = lambda some: math.hypot(
        *(w["norm"] for w in some)
    )  # of several weights in one place: as of one
    z = [
        [
            math.log10(norm(cells[at, kind]))
            if (at, kind) in cells and norm(cells[at, kind]) > 0
            else None
            for kind in kinds
        ]
        for at in layers
    ]
    words = [[_cell(at, kind, cells.get((at, kind), []), norm) for kind in kinds] for at in layers]
    traces: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "x": [safe(kind, 24) for kind in kinds],
            "y": layers,
            "z": z,
            "hovertext": words,
            "hoverinfo": "text",
            "xgap": 2,
            "ygap": 2,
            "colorscale": HEAT,
            "meta": None,
            "colorbar": {
                "title": {"text": "log10 of norm", "side": "top"},
                "thickness": 10,
                "outlinewidth": 0,
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "len": 0.72,
            },
        }
    ]
    layout = {
        "xaxis": {"type": "category", "showgrid": False},
        "yaxis": axis("layer", type="category", autorange="reversed", showgrid=False),
    }
    means = [
        _mean([w.get("coefficient") for w in weights if place(w.get("layer")) == at])
        for at in layers
    ]
    if any(mean is not None for mean in means):
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": means,
                "y": layers,
                "xaxis": "x2",
                "meta": None,
                "hoverinfo": "text",
                "width": 0.7,
                "marker": {"color": "|".join(NEUTRAL)},
                "hovertext": [
                    "" if mean is None else f"layer {at}: coefficient {mean:.4g}"
                    for at, mean in zip(layers, means, strict=True)
                ],
            }
        )
        layout["xaxis"]["domain"] = [0, 0.72]
        layout["xaxis2"] = {
            "domain": [0.78, 1],
            "title": {"text": "coefficient"},
            "rangemode": "tozero",
            "nticks": 4,
        }
    return {"traces": traces, "layout": layout, "height": 190 + 26 * len(layers)}


def _cell(at: str, kind: str, weights: Sequence[Mapping[str, Any]], norm: Any) -> str:
    if not weights:
        return f"layer {at}, {safe(kind)}: not recorded"
    named = safe(weights[0].get("name")) if len(weights) == 1 else f"{len(weights)} weights"
    mean = _mean([w.get("coefficient") for w in weights])
    return f"<b>{named}</b><br>norm {norm(weights):.4g}" + (
        "" if mean is None else f"<br>coefficient {mean:.4g}"
    )


def _mean(values: Sequence[Any]) -> float | None:
    found = [value for value in map(numbers.known, values) if value is not None]
    return sum(found) / len(found) if found else None


def movement(contents: Contents, looks: Looks, domain: str) -> Figure | None:
    """How far each weight moved over how much it matters, a mark per weight and method, both on log
    scales. Methods have importance in units of their own, so it is relative to its mean over the
    weights that a method moves.
    """
    norms = {
        w.get("name"): w.get("norm")
        for item in reversed(contents["importance"])
        for w in item.get("weights") or []
    }
    traces, met = [], set()
    for run in shown_runs(contents, domain):
        points = []
        for w in run.get("moved") or []:
            importance = numbers.known(w.get("importance"))
            importance = (
                importance if importance is not None else numbers.known(norms.get(w.get("weight")))
            )
            movement = numbers.known(w.get("movement"))
            if importance and movement and importance > 0 and movement > 0:
                points.append(
                    (
                        importance,
                        movement,
                        f"<b>{safe(label(contents, run['method']))}</b><br>{safe(w.get('weight'))}<br>"
                        f"moved {movement:.4g}, importance {importance:.4g}",
                    )
                )
        if points and run["method"] not in met:
            mean = sum(importance for importance, _, _ in points) / len(points)
            met.add(run["method"])
            look = looks[run["method"]]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [p[0] / mean for p in points],
                    "y": [p[1] for p in points],
                    "hovertext": [p[2] for p in points],
                    "hoverinfo": "text",
                    "meta": run["method"],
                    "name": safe(label(contents, run["method"])),
                    "opacity": 0.85,
                    "marker": {"color": pair(look), "symbol": look.symbol, "size": 8},
                }
            )
    if not traces:
        return None
    return {
        "traces": traces,
        "height": 430,
        "layout": {
            "xaxis": axis("importance of the weight (norm, its mean is 1)", type="log"),
            "yaxis": axis("movement of the weight (norm of its update)", type="log"),
        },
    }
