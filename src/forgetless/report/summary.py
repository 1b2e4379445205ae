"""The headline of a comparison: who forgets least at equal learning, in one number per domain and
text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgetless.report import numbers
from forgetless.report.contents import Contents, label

FEW = 9  # lines that a figure can hold without a tangle


@dataclass(frozen=True)
class Headline:
    """One number, what it says, and where."""

    number: str
    phrase: str
    detail: str
    place: str
    noise: str  # whether the difference is beyond the noise, in words


def headlines(contents: Contents, text: str | None) -> list[Headline]:
    """One headline per domain on this general text; of a single run, what was learned and what was
    lost.
    """
    if contents["kind"] == "run":
        return _of_run(contents)
    found = [
        _of_domain(contents, str(domain["name"]), text)
        for domain in contents["domains"]
        if text is not None
    ]
    return [headline for headline in found if headline is not None]


def equal_rows(contents: Contents, domain: str, text: str) -> list[dict[str, Any]]:
    """Forgetting at equal learning of one domain and text, of methods that ran.

    One without a finished run has not failed to learn: its status says so.
    """
    rows = (contents["equal_learning"].get(domain) or {}).get(text) or []
    part = next((row["part"] for row in rows if row.get("part")), None)  # the rows are of one
    ran: dict[str, bool] = {}
    for run in contents["runs"]:
        if run.get("domain") == domain:
            counts = run.get("status", "done") == "done" and part in (None, run.get("part"))
            ran[run["method"]] = ran.get(run["method"], False) or counts
    rows = [row for row in rows if row["method"] in ran]
    return [row if ran[row["method"]] else {**row, "status": "no finished run"} for row in rows]


def hidden_at_first(contents: Contents, text: str | None) -> list[str]:
    """Methods whose lines wait for a click where there are many: all but plain, ours and those that
    forget least, by places over domains and shares.
    """
    names = [str(method["name"]) for method in contents["methods"]]
    if len(names) <= FEW:
        return []
    places = dict.fromkeys(names, 0)
    for domain in contents["domains"]:
        rows = equal_rows(contents, str(domain["name"]), str(text))
        for share in {
            row["share"] for row in rows
        }:  # every share: one alone would hide a strong method that just misses it
            reached = [
                row
                for row in rows
                if row["share"] == share and numbers.known(row.get("forgetting")) is not None
            ]
            order = [row["method"] for row in sorted(reached, key=lambda row: row["forgetting"])]
            places = {
                name: place + (order.index(name) if name in order else len(names))
                for name, place in places.items()
            }
    ours = [
        str(method["name"])
        for method in contents["methods"]
        if method.get("family") == "hold" or method["name"] == contents["reference"]
    ]
    others = sorted((name for name in names if name not in ours), key=lambda name: places[name])
    return [name for name in names if name in others[max(0, FEW - len(ours)) :]]


def _of_domain(contents: Contents, domain: str, text: str) -> Headline | None:
    rows = [
        row
        for row in equal_rows(contents, domain, text)
        if numbers.known(row.get("forgetting")) is not None
    ]
    if not rows:
        return None
    share = max(row["share"] for row in rows)
    reached = {row["method"]: row for row in rows if row["share"] == share}
    best = min(reached.values(), key=lambda row: row["forgetting"])
    name, lost = (
        label(contents, best["method"]),
        numbers.nats(best["forgetting"], best.get("standard_error")),
    )
    level = f"at {numbers.percent(share)} of its learning"
    plain, place = reached.get(contents["reference"]), f"{domain}, measured on {text}"
    if best is plain:
        return Headline(
            lost,
            f"nats forgotten by {name}: nothing here forgets less",
            f"{level}, no other method comes out below it",
            place,
            "",
        )
    if plain is None:
        level = f"at {numbers.percent(share)} of plain fine-tuning's learning"
        return Headline(
            lost,
            f"nats forgotten with {name}, the least here",
            f"{level}, which plain fine-tuning is not measured at",
            place,
            "",
        )
    against, noise = (
        label(contents, contents["reference"]),
        _noise(contents, domain, text, share, best["method"]),
    )
    detail = (
        f"{lost} instead of "
        f"{numbers.nats(plain['forgetting'], plain.get('standard_error'))} nats per token, "
        f"{level}"
    )
    if best["forgetting"] <= 0:
        return Headline("0", f"nats forgotten with {name}", detail, place, noise)
    return Headline(
        _times(plain["forgetting"] / best["forgetting"]),
        f"less forgetting with {name} than with {against}",
        detail,
        place,
        noise,
    )


def _times(ratio: float) -> str:
    return (
        "over 100" if ratio > 100 else f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}"
    ) + numbers.TIMES


def _noise(contents: Contents, domain: str, text: str, share: float, best: str) -> str:
    wanted = {"domain": domain, "text": text, "share": share}
    for row in contents["differences"]:
        if {row.get("a"), row.get("b")} == {best, contents["reference"]} and all(
            row.get(key) == value for key, value in wanted.items()
        ):
            return {True: "beyond the noise", False: "within the noise"}.get(
                row.get("beyond_noise"), "noise not measured"
            )
    return "noise not measured"


def _of_run(contents: Contents) -> list[Headline]:
    point: Mapping[str, Any] = contents["runs"][0]["points"][0]
    text, domain = contents["texts"][0]["name"], contents["domains"][0]["name"]
    gained, lost = point["learning"] or {}, point["forgetting"][text] or {}
    return [
        Headline(
            numbers.nats(gained.get("nats")),
            "nats per token learned",
            f"fall of the loss on held-out text, {_error(gained)}",
            domain,
            "",
        ),
        Headline(
            numbers.nats(lost.get("nats")),
            "nats per token forgotten",
            f"rise of the general loss, {_error(lost)}",
            text,
            "",
        ),
    ]


def _error(change: Mapping[str, Any]) -> str:
    error = numbers.known(change.get("standard_error"))
    return (
        "not measured"
        if numbers.known(change.get("nats")) is None
        else "one document"
        if error is None
        else f"standard error {error:.3f}"
    )
