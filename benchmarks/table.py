"""Writes the tables of benchmarks/README.md from benchmarks/results.csv.

They hold the budgets, growth, and the rows of each measurement's latest run on each device.

    python benchmarks/table.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from budgets import budgets, growth

HERE = Path(__file__).parent
START, END = "<!-- table from results.csv: make bench -->", "<!-- end of table -->"
COLUMNS = ("shape", "tier", "rank", "tokens", "median", "20th to 80th", "against the baseline")


def latest() -> dict[tuple[str, str], list[dict[str, str]]]:
    """(device, what) -> rows of the last run, each the last of its kind.

    Rows of other commits than the last one's are history.
    """
    kept: dict[tuple[str, ...], dict[str, str]] = {}
    last: dict[tuple[str, str], dict[str, str]] = {}
    with open(HERE / "results.csv", newline="", encoding="utf-8") as file:
        for each in csv.DictReader(file):
            kept[
                tuple(
                    each[key]
                    for key in ("device", "what", "shape", "tier", "tokens", "rank", "unit")
                )
            ] = each
            last[each["device"], each["what"]] = each
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for each in kept.values():
        groups.setdefault((each["device"], each["what"]), []).append(each)
    return {
        key: [r for r in rows if commit(r) == commit(last[key])] for key, rows in groups.items()
    }


def commit(r: dict[str, str]) -> str:
    """Without the mark of uncommitted changes: the first rows appended are one."""
    return r["commit"].rstrip("+")


def render() -> str:
    """Markdown."""
    lines: list[str] = []
    groups = latest()
    for device in dict.fromkeys(name for name, _ in groups):
        mine = {what: rows for (name, what), rows in groups.items() if name == device}
        together = [r for rows in mine.values() for r in rows]
        lines += [
            f"## {device}",
            "",
            "### Budgets",
            "",
            *budgets(together),
            "",
            "### Growth",
            "",
            "Exponent p of a power n^p through the medians.",
            "",
        ]
        lines += [*growth(together), ""]
        for what, rows in mine.items():
            lines += [
                f"### {what}",
                "",
                f"{rows[-1]['versions']}, commit {rows[-1]['commit'] or 'unknown'}, "
                f"{rows[-1]['date']}",
                "",
                *plain(rows),
                "",
            ]
    return "\n".join(lines)


def plain(rows: list[dict[str, str]]) -> list[str]:
    """One line per row."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for r in rows:
        cells = (
            r["shape"],
            r["tier"],
            r["rank"],
            r["tokens"],
            f"{short(r['median'])} {r['unit']}",
            f"{short(r['p20'])} to {short(r['p80'])}",
            ratio(r),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def short(number: str) -> str:
    """Three significant digits, no exponent."""
    value = float(number)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio(r: dict[str, str]) -> str:
    """How much faster, slower or smaller than the baseline."""
    if not r["ratio"]:
        return ""
    value = float(r["ratio"])
    if r["what"] == "tuning step":
        return f"{value - 1:+.2%} of {r['baseline']}"
    if r["unit"] in ("ms", "s", "ms per 1,000 tokens"):
        return f"{1 / value:.3g}x as fast as {r['baseline']}"
    return f"{value:.2%} of {r['baseline']}"


if __name__ == "__main__":
    page = (HERE / "README.md").read_text(encoding="utf-8")
    head, tail = page.split(START)[0], page.split(END)[1]
    (HERE / "README.md").write_text(f"{head}{START}\n\n{render()}\n{END}{tail}", encoding="utf-8")
