"""What a run's forgetting budget has to show: what was promised and checked, what other budgets
would have bought, the trade-off along the size of the update, and what the controller did while
training. Budgets are kept on the loss; per cent are of perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.files.schema import GENERAL
from forgetless.report import numbers
from forgetless.report.figures import Figure, axis, safe
from forgetless.report.numbers import perplexity_percent
from forgetless.report.palette import ACCENT, HUES, NEUTRAL
from forgetless.report.tables import Cell, Table, made, number, text


def sentences(report: dict[str, Any]) -> list[str]:
    """The report in plain English."""
    predicted = report["verdict"] == "predicted"
    lines = _predicted(report) if predicted else _checked(report)
    if report["share"] == 0:
        more = (
            "Give a larger budget, or --general TEXT"
            if predicted
            else "Give a larger budget or more general text"
        )
        lines.append(
            f"  no part of the update keeps this budget: the result is the model as it was. {more}"
        )
    elif report["share"] == 1:
        lines.append("  all of the update is kept: the budget was not used up")
    else:
        lines.append(f"  the update was {_how(report)}")
    if report["learning"] is not None:
        lost = "predicted forgetting" if predicted else "forgetting"
        per = (
            f", {report['learning_per_nat']:.3g} nats for each nat of {lost}"
            if report["learning_per_nat"] is not None
            else ""
        )
        lines.append(
            f"  learning {report['learning']['nats']:.4f} nats per token on "
            f"{report['learning_on']}{per}"
        )
    if len(report["each"]) > 1:
        lines.append(
            "  each way within this budget, on the control part: "
            + "; ".join(_described(f"{way}:", point) for way, point in report["each"].items())
        )
    return [*lines, *_otherwise(report)]


def _checked(report: dict[str, Any]) -> list[str]:
    """What the check said."""
    check, limit = report["check"], report["budget_nats"]
    of = (
        f" of {check['on']}, of {len(check['each'])} sources the nearest to the budget,"
        if check["each"]
        else ""
    )
    sign = {"met": "met", "not shown": "NOT SHOWN", "exceeded": "EXCEEDED"}[report["verdict"]]
    lines = [
        f"budget {report['budget']} ({limit:.4g} nats per token of general text): {sign}",
        f"  checked on {check['documents']} documents{of} kept for this: rise "
        f"{perplexity_percent(check['nats']):+.2f} % of perplexity ({check['nats']:+.5f} nats), "
        f"between {check['low']:+.5f} and {check['high']:+.5f}; promised at most "
        f"{report['promised']:+.5f}",
        f"  ({report['how']})",
    ]
    if report["verdict"] == "not shown":
        more = report["documents_to_decide"]
        kind = "more documents" if check["on"] == GENERAL else "more held-out rows"
        lines.append(
            "  the budget lies within this interval; "
            f"{'more text' if more is None else f'about {more} {kind}'} would decide"
        )
    if report["verdict"] == "exceeded":
        lines.append(
            "  the check part forgets more than the control part does, also after a fallback: is "
            "the general text of one kind? Use a smaller budget"
        )
    return lines


def _predicted(report: dict[str, Any]) -> list[str]:
    """What was predicted, how well that is known, and how to find out."""
    rise, known = report["predicted"], report["calibration"]
    return [
        f"budget {report['budget']} ({report['budget_nats']:.4g} nats per token of general "
        "text): PREDICTED, not measured",
        f"  predicted by the importance file: rise {rise['percent']:+.2f} % of perplexity "
        f"({rise['nats']:+.5f} nats); of 20 such updates, 19 are expected "
        f"below {rise['bound']:+.5f}",
        f"  (calibrated on {known['updates']} updates: what energy costs is off by a factor of "
        f"{known['error']:.2g} typically, {known['factor']:.2g} at most "
        "19 times in 20, for training and text like theirs)",
        "  no general text was looked at: forgetless eval MODEL --adapter OUT/final --general "
        "TEXT measures what was lost; tune with --general to check it",
    ]


def _how(point: dict[str, Any]) -> str:
    """How far an update was made smaller."""
    if point["share"] == 1:
        return "all of it"
    return (
        f"scaled by {point['share']:.3g}"
        if point["mu"] is None
        else f"shrunk along importance at mu {point['mu']:.3g}"
    )


def _described(name: str, point: dict[str, Any]) -> str:
    """What one way, or one budget, buys."""
    learning = "" if point["learning"] is None else f", learning {point['learning']:.4f}"
    return f"{name} {_how(point)}{learning}" if point["share"] else f"{name} nothing"


def _otherwise(report: dict[str, Any]) -> list[str]:
    """What other budgets would buy."""
    parts = [
        _described(f"with {name}", other)
        for name, other in report["others"].items()
        if name != report["budget"]
    ]
    return ["  you would get: " + "; ".join(parts)] if parts else []


WAYS = {
    "shrink": ("shrunk along importance", "|".join(ACCENT), "circle"),
    "scale": ("scaled", "|".join(NEUTRAL), "square"),
}
PROBED = "|".join(HUES[0])
NOTHING = 1e-9


def table(budget: Mapping[str, Any]) -> Table:
    """What a smaller or a larger budget would have bought, beside this one."""
    given = numbers.known(budget.get("budget_nats"))
    rows = [(numbers.text(budget.get("budget")), given, budget, "this one")]
    for name, other in (budget.get("others") or {}).items():
        if str(name) != str(budget.get("budget")) and isinstance(other, Mapping):
            rows.append((str(name), _nats(str(name)), other, ""))
    rows.sort(key=lambda row: (row[1] is None, row[1] or 0.0))
    lines = [
        [
            text(name),
            number(nats, show=lambda v: f"{v:.4f}"),
            Cell(_kept(found)),
            _learned(found),
            Cell(mark),
        ]
        for name, nats, found, mark in rows
    ]
    return made(["budget", "nats per token", "what is kept", "learning", ""], lines)


def _nats(name: str) -> float | None:
    """'2%' in nats per token."""
    try:
        return math.log1p(float(name.rstrip("% ")) / 100)
    except ValueError:
        return None


def _learned(found: Mapping[str, Any]) -> Cell:
    learning = found.get("learning")
    return (
        number(learning.get("nats"), learning.get("standard_error"))
        if isinstance(learning, Mapping)
        else number(learning)
    )


def _kept(found: Mapping[str, Any]) -> str:
    """How far the update was made smaller."""
    share, mu = numbers.known(found.get("share")), numbers.known(found.get("mu"))
    if share is None:
        return numbers.MISSING
    if share in (0.0, 1.0):
        return "all of the update" if share else "nothing of it"
    return (
        f"update {numbers.TIMES} {share:.2g}"
        if mu is None
        else f"update shrunk along importance, mu {mu:.2g}"
    )


def trade_off(budget: Mapping[str, Any]) -> Figure | None:
    """Learning over the rise on the control part, a line per way of making the update smaller; the
    whiskers end where the check's bound was planned.
    """
    traces = []
    for way, (name, colour, symbol) in WAYS.items():
        points = [
            point
            for point in budget.get("curve") or []
            if point.get("way") == way and _whole(point)
        ]
        points.sort(key=lambda point: -point["share"])
        if points:
            rises = [point["rise"]["nats"] for point in points]
            bounds = [point["bound"] - rise for point, rise in zip(points, rises, strict=True)]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": rises,
                    "y": [point["learning"] for point in points],
                    "name": name,
                    "meta": None,
                    "line": {"color": colour, "width": 1.75},
                    "marker": {"color": colour, "symbol": symbol, "size": 8},
                    "hoverinfo": "text",
                    "error_x": {
                        "type": "data",
                        "symmetric": False,
                        "array": bounds,
                        "arrayminus": [0] * len(points),
                        "thickness": 1,
                        "width": 3,
                        "color": colour,
                    },
                    "hovertext": [_point(name, point) for point in points],
                }
            )
    limit = numbers.known(budget.get("budget_nats"))
    if not traces or limit is None:
        return None
    return {
        "traces": traces,
        "height": 400,
        "layout": {
            "xaxis": axis(
                "predicted rise of the general loss, nats per token; whisker: bound for 19 of 20 "
                "updates"
                if budget.get("predicted")
                else (
                    "rise of the general loss on control text, nats per token; whisker: planned "
                    "bound of the check"
                ),
                rangemode="tozero",
            ),
            "yaxis": axis("learning, nats per token", rangemode="tozero"),
            "shapes": [_line("x", limit)],
            "annotations": [
                {
                    "x": limit,
                    "yref": "paper",
                    "y": 0,
                    "yanchor": "bottom",
                    "xanchor": "left",
                    "showarrow": False,
                    "xshift": 4,
                    "text": f"budget {safe(budget.get('budget'), 20)}",
                }
            ],
        },
    }


def _whole(point: Mapping[str, Any]) -> bool:
    rise = point.get("rise")
    return isinstance(rise, Mapping) and None not in map(
        numbers.known,
        (rise.get("nats"), point.get("bound"), point.get("learning"), point.get("share")),
    )


def _point(name: str, point: Mapping[str, Any]) -> str:
    return "<br>".join(
        [
            f"<b>{_kept(point)}</b>"
            if point["share"] != 1
            else f"<b>all of the update</b> ({name})",
            f"learning {numbers.nats(point['learning'])}",
            f"rise {numbers.nats(point['rise']['nats'])}, planned bound "
            f"{numbers.nats(point['bound'])}",
        ]
    )


def control(budget: Mapping[str, Any]) -> Figure | None:
    """Above, the rise as a share of the budget: by energy (line) and as each probe found it
    (marks). Below, the strength that followed.
    """
    limit = numbers.known(budget.get("budget_nats"))
    looks = [
        look
        for look in budget.get("trajectory") or []
        if numbers.known(look.get("step")) is not None
    ]
    if not looks or not limit:
        return None
    known = "predicted rise" if budget.get("predicted") else "rise by energy"
    traces = [
        _trace(
            looks,
            "rise",
            "|".join(ACCENT),
            f"{known}, share of the budget",
            1 / limit,
            mode="lines",
        ),
        _trace(looks, "probe", PROBED, "one probe, share of the budget", 1 / limit, mode="markers"),
        _trace(looks, "strength", "|".join(ACCENT), "strength", 1.0, mode="lines", yaxis="y2"),
    ]
    return {
        "traces": [trace for trace in traces if trace["x"]],
        "height": 430,
        "layout": {
            "xaxis": axis("optimizer step", anchor="y2"),
            "yaxis": axis("rise, share of the budget", domain=[0.52, 1.0]),
            "yaxis2": axis("strength", domain=[0.0, 0.42], type="log"),
            "shapes": [_line("y", 1.0)],
        },
    }


def _trace(
    looks: Sequence[Mapping[str, Any]],
    key: str,
    colour: str,
    name: str,
    unit: float,
    *,
    mode: str,
    yaxis: str = "y",
) -> dict[str, Any]:
    found = [
        (look["step"], unit * look[key])
        for look in looks
        if numbers.known(look.get(key)) is not None
    ]
    if yaxis == "y2":  # on a log scale; nothing is held at 0
        found = [(step, value) for step, value in found if value > NOTHING]
    return {
        "type": "scatter",
        "mode": mode,
        "x": [step for step, _ in found],
        "y": [value for _, value in found],
        "name": name,
        "meta": None,
        "yaxis": yaxis,
        "line": {"color": colour, "width": 1.75},
        "marker": {"color": colour, "size": 7, "symbol": "diamond"},
        "hoverinfo": "text",
        "hovertext": [f"step {step:g}: {name} {value:.3g}" for step, value in found],
    }


def _line(across: str, at: float) -> dict[str, Any]:
    """A dotted line at a value of one axis."""
    other = "y" if across == "x" else "x"
    return {
        "type": "line",
        f"{across}0": at,
        f"{across}1": at,
        f"{other}ref": "paper" if across == "x" else "x domain",
        f"{other}0": 0,
        f"{other}1": 1,
        "line": {"width": 1, "dash": "dot"},
    }
