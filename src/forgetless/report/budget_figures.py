"""The figures of a forgetting budget: the trade-off along the size of the update, and what the
controller did while training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forgetless.files.budget_json import BudgetReport, ControllerLook, CurvePoint
from forgetless.report import numbers
from forgetless.report.budget import fraction_in_words
from forgetless.report.drawing import (
    DOTTED,
    GREY_COLOURS,
    OUR_COLOURS,
    Figure,
    FigurePart,
    Trace,
    axis,
    safe,
)
from forgetless.report.palette import HUES

# Each way of making an update smaller: its name, colour and symbol.
WAYS = {
    "shrink": ("shrunk along importance", OUR_COLOURS, "circle"),
    "scale": ("scaled", GREY_COLOURS, "square"),
}
# The colour of what single probes measured.
PROBE_COLOURS = "|".join(HUES[0])
# A strength below this holds nothing, and has no place on a log scale.
NO_STRENGTH = 1e-9
# The title of the axis of rises that were measured, and below it of those that were predicted.
MEASURED_RISE = (
    "rise of the general loss on control text, nats per token; whisker: planned bound of the check"
)
PREDICTED_RISE = (
    "predicted rise of the general loss, nats per token; whisker: bound for 19 of 20 updates"
)


def trade_off(report: BudgetReport) -> Figure | None:
    """Learning over the rise on the control part, a line per way of making the update smaller; the
    whiskers end where the check's bound was planned.
    """
    traces = [
        _way(points, *look)
        for way, look in WAYS.items()
        if (points := [each for each in report.curve if each.way == way and _is_complete(each)])
    ]
    limit = report.budget_nats
    if not traces or limit is None:
        return None
    title = PREDICTED_RISE if report.predicted else MEASURED_RISE
    return {
        "traces": traces,
        "height": 400,
        "layout": {
            "xaxis": axis(title, rangemode="tozero"),
            "yaxis": axis("learning, nats per token", rangemode="tozero"),
            "shapes": [_line_at("x", limit)],
            "annotations": [_budget_note(report, limit)],
        },
    }


def _is_complete(point: CurvePoint) -> bool:
    rise = None if point.rise is None else point.rise.nats
    return None not in (rise, point.bound, point.learning, point.fraction)


def _way(points: Sequence[CurvePoint], name: str, colour: str, symbol: str) -> Trace:
    points = sorted(points, key=lambda point: -(point.fraction or 0.0))
    rises = [_rise_of(point) for point in points]
    bounds = [(point.bound or 0.0) - _rise_of(point) for point in points]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": rises,
        "y": [point.learning for point in points],
        "name": name,
        "meta": None,
        "line": {"color": colour, "width": 1.75},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": bounds,
            "arrayminus": [0] * len(points),
            "thickness": 1,
            "width": 3,
            "color": colour,
        },
        "hovertext": [_curve_hover(name, point) for point in points],
    }


def _rise_of(point: CurvePoint) -> float:
    return (None if point.rise is None else point.rise.nats) or 0.0


def _curve_hover(name: str, point: CurvePoint) -> str:
    size = f"<b>{fraction_in_words(point)}</b>"
    if point.fraction == 1:
        size = f"<b>all of the update</b> ({name})"
    lines = [
        size,
        f"learning {numbers.nats(point.learning)}",
        f"rise {numbers.nats(_rise_of(point))}, planned bound {numbers.nats(point.bound)}",
    ]
    return "<br>".join(lines)


def _budget_note(report: BudgetReport, limit: float) -> FigurePart:
    return {
        "x": limit,
        "yref": "paper",
        "y": 0,
        "yanchor": "bottom",
        "xanchor": "left",
        "showarrow": False,
        "xshift": 4,
        "text": f"budget {safe(report.budget, 20)}",
    }


def control(report: BudgetReport) -> Figure | None:
    """Above, the rise as a fraction of the budget: by energy (line) and as each probe measured it
    (marks). Below, the strength that followed.
    """
    limit = report.budget_nats
    looks = [look for look in report.trajectory or [] if look.step is not None]
    if not looks or not limit:
        return None
    known = "predicted rise" if report.predicted else "rise by energy"
    of_budget = 1 / limit
    what = "strength" if looks[-1].kl_weight is None else "weight of the divergence"
    traces = [
        _look_trace(
            looks,
            lambda look: _product(look.rise, of_budget),
            f"{known}, fraction of the budget",
            OUR_COLOURS,
            mode="lines",
        ),
        _look_trace(
            looks,
            lambda look: _product(look.probe, of_budget),
            "one probe, fraction of the budget",
            PROBE_COLOURS,
            mode="markers",
        ),
        _look_trace(looks, _strength, what, OUR_COLOURS, mode="lines", yaxis="y2"),
    ]
    return {
        "traces": [trace for trace in traces if trace["x"]],
        "height": 430,
        "layout": {
            "xaxis": axis("optimizer step", anchor="y2"),
            "yaxis": axis("rise, fraction of the budget", domain=[0.52, 1.0]),
            "yaxis2": axis(what, domain=[0.0, 0.42], type="log"),
            "shapes": [_line_at("y", 1.0)],
        },
    }


def _product(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _strength(look: ControllerLook) -> float | None:
    """The weight of the divergence after a look, where the budget set one, else the strength of the
    pull; None where nothing was held.
    """
    strength = look.strength if look.kl_weight is None else look.kl_weight
    held = strength is not None and strength > NO_STRENGTH
    return float(strength or 0.0) if held else None


def _look_trace(
    looks: Sequence[ControllerLook],
    value: Callable[[ControllerLook], float | None],
    name: str,
    colour: str,
    *,
    mode: str,
    yaxis: str = "y",
) -> Trace:
    """A line or marks of one value of the controller's looks, where it is known."""
    known = [(look.step or 0, y) for look in looks if (y := value(look)) is not None]
    return {
        "type": "scatter",
        "mode": mode,
        "x": [step for step, _ in known],
        "y": [y for _, y in known],
        "name": name,
        "meta": None,
        "yaxis": yaxis,
        "line": {"color": colour, "width": 1.75},
        "marker": {"color": colour, "size": 7, "symbol": "diamond"},
        "hovertext": [f"step {step:g}: {name} {y:.3g}" for step, y in known],
    }


def _line_at(across: str, at: float) -> FigurePart:
    """A dotted line at a value of one axis."""
    other = "y" if across == "x" else "x"
    return {
        "type": "line",
        f"{across}0": at,
        f"{across}1": at,
        f"{other}ref": "paper" if across == "x" else "x domain",
        f"{other}0": 0,
        f"{other}1": 1,
        "line": DOTTED,
    }
