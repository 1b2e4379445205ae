"""benchmarks/results.csv -> the tables in benchmarks/README.md: the latest row of each measurement on each device.

python benchmarks/table.py
"""

from __future__ import annotations

import csv
from pathlib import Path

HERE = Path(__file__).parent
START, END = "<!-- table from results.csv: make bench -->", "<!-- end of table -->"
COLUMNS = ("shape", "tier", "rank", "tokens", "median", "20th to 80th", "against the baseline")


def latest() -> dict[tuple[str, str], list[dict[str, str]]]:
    """(device, what) -> rows, each the last of its kind, in the order of first appearance."""
    kept: dict[tuple[str, ...], dict[str, str]] = {}
    with open(HERE / "results.csv", newline="", encoding="utf-8") as file:
        for each in csv.DictReader(file):
            kept[tuple(each[key] for key in ("device", "what", "shape", "tier", "tokens", "rank", "unit"))] = each
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for each in kept.values():
        groups.setdefault((each["device"], each["what"]), []).append(each)
    return groups


def render() -> str:
    """Markdown."""
    lines = []
    device = None
    for (name, what), rows in latest().items():
        if name != device:
            lines += [f"## {name}", ""]
            device = name
        versions = sorted({f"{r['versions']}, commit {r['commit'] or 'unknown'}, {r['date']}" for r in rows})
        lines += [f"### {what}", "", "; ".join(versions), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for r in rows:
            cells = (r["shape"], r["tier"], r["rank"], r["tokens"], f"{short(r['median'])} {r['unit']}", f"{short(r['p20'])} to {short(r['p80'])}", ratio(r))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


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
    if r["unit"] == "ms":
        return f"{1 / value:.3g}x as fast as {r['baseline']}"
    return f"{value:.2%} of {r['baseline']}"


if __name__ == "__main__":
    page = (HERE / "README.md").read_text(encoding="utf-8")
    head, tail = page.split(START)[0], page.split(END)[1]
    (HERE / "README.md").write_text(f"{head}{START}\n\n{render()}\n{END}{tail}", encoding="utf-8")
