"""The budgets of the design against the rows of results.csv, and how times grow.

A budget has one line, met or missed, with the numbers that say why. Each verdict is taken over all
shapes measured: a budget is met only where the worst of them is within it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

Row = dict[str, str]
AUTHORS, PRODUCTS = "authors' formulation", "three products alone"
NOTHING = 0.05  # bytes per weight: what repeated processes differ by


def budgets(rows: list[Row]) -> list[str]:
    """Lines of a markdown table; `rows` are those of one device."""
    lines = ["| what | to reach | measured | verdict |", "|---|---|---|---|"]
    for what, target, judge in (
        ("one pull, dense f32, against the authors' formulation", "at least 4x faster", pull_f32),
        ("one pull, factored, against the same", "at least 50x faster", pull_factored),
        (
            "tuning step with the pull, q_proj + v_proj, at 2,048 tokens",
            "+2 % dense, +0.5 % factored",
            tuning,
        ),
        (
            "recording, time to the frontier of the full-model diagonal Fisher",
            "at least 20x less",
            recording,
        ),
        (
            "file, q_proj + v_proj of an 8B model, against the f32 Fisher of the whole model",
            "2.2 % u8, 1.1 % u4, 0.05 % factored",
            files,
        ),
        (
            "peak memory of tuning, added per target weight",
            "1.1 bytes u8, nothing factored",
            memory,
        ),
        ("fused kernel on a GPU, against its roofline", "at least 50 % of it", fused),
    ):
        measured, verdict = judge(rows)
        lines.append(f"| {what} | {target} | {measured} | {verdict} |")
    return lines


def select(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """Rows with these values."""
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def pull_f32(rows: list[Row]) -> tuple[str, str]:
    """Where it is missed, how fast a pull of the three products and nothing else would be."""
    faster = times_faster(rows, "f32")
    if not faster:
        return NOT_MEASURED
    text, worst = over_shapes(faster)
    verdict = judged([value >= 4 for value in faster.values()])
    limit = times_faster(rows, PRODUCTS).get(worst)
    if faster[worst] < 4 and limit:
        verdict += (
            f": at {worst} its three products, which the authors' formulation also takes, alone "
            f"would be {limit:.1f}x as fast; the rest is one pass "
            "over the importance and what any call costs"
        )
    return text, verdict


def pull_factored(rows: list[Row]) -> tuple[str, str]:
    """The fixed cost of a call shows on the smallest layers."""
    faster = times_faster(rows, "factored")
    if not faster:
        return NOT_MEASURED
    text, worst = over_shapes(faster)
    verdict = judged([value >= 50 for value in faster.values()])
    if faster[worst] < 50:
        [slow] = select(rows, what="pull", shape=worst, tier="factored")
        verdict += (
            f": at {worst} a call takes {float(slow['median']):.2f} ms, most of it the "
            "fixed cost of some thirty small operations"
        )
    return text, verdict


def tuning(rows: list[Row]) -> tuple[str, str]:
    """Dense tiers, and factored."""
    added = {
        r["tier"]: 100 * (float(r["ratio"]) - 1)
        for r in select(rows, what="tuning step", tokens="2048")
        if r["ratio"]
    }
    limits = {"f32": 2.0, "u8": 2.0, "u4": 2.0, "factored": 0.5}
    return compared(
        added, limits, lambda value: f"{value:+.2f} %", also=("kronecker", "kronecker:16")
    )


def recording(rows: list[Row]) -> tuple[str, str]:
    """Per token, and to the frontier."""
    found = [
        r for r in select(rows, what="recording to the frontier") if r["tier"] != r["baseline"]
    ]
    if not found:
        return NOT_MEASURED
    [ours] = found
    [base] = select(rows, what="recording to the frontier", tier=ours["baseline"])
    [each] = select(rows, what="recording", tier=ours["tier"])
    less, per_token = 1 / float(ours["ratio"]), 1 / float(each["ratio"])
    text = (
        f"{less:.1f}x less: {ours['tier']} from {int(ours['tokens']):,} tokens, the Fisher "
        f"from {int(base['tokens']):,}; {per_token:.2f}x less per token"
    )
    why = (
        f": {int(base['tokens']) / int(ours['tokens']):.0f}x of it is tokens, and how few the "
        "Fisher could do with was not tried"
    )
    return text, judged([less >= 20]) + why


def files(rows: list[Row]) -> tuple[str, str]:
    """Shares of the whole model's Fisher."""
    shares = {
        r["tier"]: 100 * float(r["ratio"])
        for r in select(rows, what="file", unit="MiB")
        if r["ratio"]
    }
    return compared(
        shares,
        {"u8": 2.2, "u4": 1.1, "factored": 0.05},
        lambda value: f"{value:.2g} %",
        also=("kronecker:16",),
    )


def memory(rows: list[Row]) -> tuple[str, str]:
    """Bytes per target weight over the same process without."""
    added = {r["tier"]: float(r["median"]) for r in select(rows, what="added memory")}
    return compared(
        added,
        {"u8": 1.1, "factored": NOTHING},
        lambda value: f"{value:+.2f}",
        also=("f32", "u4", "kronecker:16"),
    )


def fused(rows: list[Row]) -> tuple[str, str]:
    """Needs rows of a GPU."""
    share = {
        r["shape"]: 100 * float(r["ratio"])
        for r in select(rows, what="fused roofline")
        if r["ratio"]
    }
    return (
        (over_shapes(share, " %")[0], judged([value >= 50 for value in share.values()]))
        if share
        else NOT_MEASURED
    )


NOT_MEASURED = ("no row", "not measured")


def compared(
    values: dict[str, float],
    limits: dict[str, float],
    show: Callable[[float], str],
    also: tuple[str, ...],
) -> tuple[str, str]:
    """Values per tier against upper limits; those in `also` are shown only."""
    if not all(tier in values for tier in limits):
        return NOT_MEASURED
    text = ", ".join(f"{tier} {show(values[tier])}" for tier in (*limits, *also) if tier in values)
    over = [tier for tier, limit in limits.items() if values[tier] > limit]
    return text, judged([tier not in over for tier in limits]) + (
        f": {', '.join(over)} above" if over else ""
    )


def judged(each: list[bool]) -> str:
    """met, missed, or how many of them."""
    return (
        "met"
        if all(each)
        else "**missed**"
        if not any(each)
        else f"**met by {sum(each)} of {len(each)}**"
    )


def times_faster(rows: list[Row], tier: str) -> dict[str, float]:
    """Shape -> how many times as fast as the authors' formulation one pull is."""
    return {
        r["shape"]: 1 / float(r["ratio"])
        for r in select(rows, what="pull", tier=tier)
        if r["ratio"] and r["baseline"] == AUTHORS
    }


def over_shapes(values: dict[str, float], unit: str = "x") -> tuple[str, str]:
    """Text of the range, and the shape with the least."""
    least, most = (
        min(values, key=lambda shape: values[shape]),
        max(values, key=lambda shape: values[shape]),
    )
    return f"{values[least]:.3g}{unit} ({least}) to {values[most]:.3g}{unit} ({most})", least


# what is varied -> (measurement, where the number is found in a row)
GROWTH: dict[str, tuple[str, Callable[[Row], float]]] = {
    "pull, width": ("growth with width", lambda r: float(re.findall(r"\d+", r["shape"])[-1])),
    "pull, rank": ("growth with rank", lambda r: float(r["rank"])),
    "pull, layers": ("growth with layers", lambda r: float(re.findall(r"\d+", r["shape"])[0])),
    "tuning step, tokens": ("tuning step", lambda r: float(r["tokens"])),
    "recording per token, width": (
        "recording, growth with width",
        lambda r: float(re.findall(r"\d+", r["shape"])[-1]),
    ),
    "recording per token, tokens": ("recording, growth with tokens", lambda r: float(r["tokens"])),
    "kept while recording, width": (
        "recording, bytes",
        lambda r: float(re.findall(r"\d+", r["shape"])[-1]),
    ),
}


def growth(rows: list[Row]) -> list[str]:
    """Lines of a markdown table: the exponent p of time ~ n^p (or bytes), least squares of
    logarithms.
    """
    lines = ["| what grows, with what | exponent |", "|---|---|"]
    for title, (what, number) in GROWTH.items():
        points: dict[str, list[tuple[float, float]]] = {}
        for r in select(rows, what=what):
            if r["unit"] != "MiB in the file":
                points.setdefault(r["tier"], []).append(
                    (math.log(number(r)), math.log(float(r["median"])))
                )
        cells = [
            f"{tier} {slope(pairs):.2f}"
            for tier, pairs in points.items()
            if len({x for x, _ in pairs}) > 1
        ]
        if cells:
            lines.append(f"| {title} | {', '.join(cells)} |")
    return lines


def slope(pairs: list[tuple[float, float]]) -> float:
    """Of the straight line through (x, y) by least squares."""
    x0, y0 = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return sum((x - x0) * (y - y0) for x, y in pairs) / sum((x - x0) ** 2 for x, _ in pairs)
