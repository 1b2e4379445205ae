"""The figures of training: what runs logged, and how far each weight moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from forgetless.files.compare_json import Comparison, TrialRun
from forgetless.files.measured_json import MovedWeight
from forgetless.report import numbers
from forgetless.report.contents import label, reported_part
from forgetless.report.drawing import Figure, FigurePart, Looks, Trace, axis, pair, safe

# What is drawn over the steps of training, a panel each.
PANELS = ("loss", "energy", "strength")
# So many runs of a method are drawn; more of them would hide each other.
SEEDS_SHOWN = 3
# The part of the height that stays free between two panels.
GAP = 0.09
# How far the largest energy may be above the smallest on a linear scale; beyond it, importance of
# different units stands side by side.
WIDE = 100


def shown_runs(contents: Comparison, domain: str) -> list[TrialRun]:
    """The finished runs that stand for the methods of a domain: the chosen ones of the reported
    part, else all of it; a few seeds each.
    """
    part = reported_part(contents)
    runs = [
        run
        for run in contents.runs
        if run.domain == domain and run.part in (None, part) and run.done
    ]
    chosen = [run for run in runs if run.chosen] or runs
    counted: dict[str, int] = {}
    shown = []
    for run in sorted(chosen, key=lambda run: numbers.finite(run.seed) or 0):
        counted[run.method] = counted.get(run.method, 0) + 1
        if counted[run.method] <= SEEDS_SHOWN:
            shown.append(run)
    return shown


def training_curves(contents: Comparison, looks: Looks, domain: str) -> Figure | None:
    """Loss, energy and strength over the steps of training, one panel each where any run logged it,
    a line per run.
    """
    runs = [run for run in shown_runs(contents, domain) if run.log]
    panels = [
        key
        for key in PANELS
        if any(numbers.finite(entry.get(key)) is not None for run in runs for entry in run.log)
    ]
    by_panel = [
        [trace for run in runs for trace in _curve(contents, looks, run, key, panel)]
        for panel, key in enumerate(panels, 1)
    ]
    if not any(by_panel):
        return None
    steps = axis("optimizer step", anchor=f"y{len(panels)}" if len(panels) > 1 else "y")
    layout = {"xaxis": steps}
    for panel, key in enumerate(panels, 1):
        layout[f"yaxis{_axis_number(panel)}"] = _panel_axis(
            key, by_panel[panel - 1], _panel_place(panel, len(panels))
        )
    traces = [trace for traces in by_panel for trace in traces]
    return {"traces": traces, "layout": layout, "height": 90 + 190 * len(panels)}


def _axis_number(panel: int) -> str:
    """How figures count axes: y, y2, y3."""
    return str(panel) if panel > 1 else ""


def _panel_place(panel: int, panels: int) -> list[float]:
    """Where a panel begins and ends; the first one is on top."""
    tall = (1 - GAP * (panels - 1)) / panels
    top = 1 - (panel - 1) * (tall + GAP)
    return [max(0.0, top - tall), top]


def _curve(
    contents: Comparison, looks: Looks, run: TrialRun, key: str, panel: int
) -> Iterator[Trace]:
    """The line of one run in one panel; nothing where it did not log that."""
    entries = [
        (entry["step"], entry[key])
        for entry in run.log
        if None not in (numbers.finite(entry.get(key)), numbers.finite(entry.get("step")))
    ]
    if not entries:
        return
    look, shown = looks[run.method], safe(label(contents, run.method))
    yield {
        "type": "scatter",
        "mode": "lines" if len(entries) > 1 else "markers",
        "x": [step for step, _ in entries],
        "y": [value for _, value in entries],
        "meta": run.method,
        "name": shown,
        "xaxis": "x",
        "yaxis": f"y{_axis_number(panel)}",
        "line": {"color": pair(look), "width": 1.75, "dash": look.dash},
        "marker": {"color": pair(look), "symbol": look.symbol, "size": 8},
        "opacity": 0.85,
        "head": f"<b>{shown}</b>, seed {run.seed}",
        "hovertext": [f"step {step:g}: {key} {value:.4g}" for step, value in entries],
    }


def _panel_axis(key: str, traces: Sequence[Trace], place: list[float]) -> FigurePart:
    values = [value for trace in traces for value in trace["y"]]
    wide = key == "energy" and min(values, default=0) > 0 and max(values) > WIDE * min(values)
    return axis(
        "strength" if key == "strength" else f"{key}, nats",
        domain=place,
        type="log" if wide else "linear",
        rangemode="normal" if wide or key == "loss" else "tozero",
    )


def movement_figure(contents: Comparison, looks: Looks, domain: str) -> Figure | None:
    """How far each weight moved over how much it matters, a mark per weight and method, both on log
    scales. Methods have importance in units of their own, so it is relative to its mean over the
    weights that a method moves.
    """
    norms = {
        weight.name: weight.norm
        for item in reversed(contents.importance)
        for weight in item.weights
    }
    traces: dict[str, Trace] = {}
    for run in shown_runs(contents, domain):
        points = list(_weight_marks(run, norms))
        if points and run.method not in traces:
            traces[run.method] = _marks(contents, looks, run, points)
    if not traces:
        return None
    return {
        "traces": list(traces.values()),
        "height": 430,
        "layout": {
            "xaxis": axis("importance of the weight (norm, its mean is 1)", type="log"),
            "yaxis": axis("movement of the weight (norm of its update)", type="log"),
        },
    }


Mark = tuple[float, float, str]  # importance, movement, what is said on hovering


def _weight_marks(run: TrialRun, norms: dict[Any, float | None]) -> Iterator[Mark]:
    for weight in run.moved or []:
        importance = _importance_of(weight, norms)
        if importance > 0 and weight.movement and weight.movement > 0:
            yield (
                importance,
                float(weight.movement),
                f"{safe(weight.weight)}<br>"
                f"moved {weight.movement:.4g}, importance {importance:.4g}",
            )


def _importance_of(weight: MovedWeight, norms: dict[Any, float | None]) -> float:
    """How much a weight matters to the run that moved it, else by the comparison's first file that
    knows it; 0 where nothing does.
    """
    own = weight.importance
    return float((norms.get(weight.weight) if own is None else own) or 0)


def _marks(contents: Comparison, looks: Looks, run: TrialRun, points: Sequence[Mark]) -> Trace:
    mean = sum(importance for importance, _, _ in points) / len(points)
    look = looks[run.method]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [importance / mean for importance, _, _ in points],
        "y": [moved for _, moved, _ in points],
        "head": f"<b>{safe(label(contents, run.method))}</b>",
        "hovertext": [said for _, _, said in points],
        "meta": run.method,
        "name": safe(label(contents, run.method)),
        "opacity": 0.85,
        "marker": {"color": pair(look), "symbol": look.symbol, "size": 8},
    }
