"""The tables, for the page and for markdown: what is shown, and the whole number behind it for
sorting and for CSV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.report import numbers
from forgetless.report.contents import Contents, label
from forgetless.report.summary import equal_rows

TRANSFER = ("average", "backward_transfer", "forward_transfer")


@dataclass(frozen=True)
class Cell:
    """What is shown; `value` is the number behind it (None: text, or not measured), `error` its
    standard error, `mark` the method of a coloured dot.
    """

    shown: str
    value: float | None = None
    error: float | None = None
    mark: str | None = None


@dataclass(frozen=True)
class Column:
    title: str
    number: bool = True
    errors: bool = False  # some cell has a standard error: a column of its own in CSV


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def made(titles: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """A table without the columns in which nothing was measured; a column is of numbers where any
    cell has one.
    """
    filled = [
        i
        for i in range(len(titles))
        if any(row[i].shown not in (numbers.MISSING, "") for row in rows)
    ]
    columns = tuple(
        Column(
            titles[i],
            any(row[i].value is not None for row in rows),
            any(row[i].error is not None for row in rows),
        )
        for i in filled
    )
    return Table(columns, tuple(tuple(row[i] for i in filled) for row in rows))


def number(value: Any, error: Any = None, show: Any = numbers.nats) -> Cell:
    found, spread = numbers.known(value), numbers.known(error)
    return Cell(show(found, spread) if spread is not None else show(found), found, spread)


def text(value: Any) -> Cell:
    return Cell(numbers.text(value))


def methods(contents: Contents, domain: str, text_name: str) -> Table:
    """A row per method: forgetting at equal learning, then what its whole update learned and lost,
    and what it cost.
    """
    rows = equal_rows(contents, domain, text_name)
    shares = sorted({row["share"] for row in rows}, reverse=True)
    titles = [
        "method",
        *(f"forgetting at {numbers.percent(s)}" for s in shares),
        "learning, whole update",
        "forgetting, whole update",
        "accuracy after",
        "area",
        "seconds",
        "peak memory",
        "extra data",
        "file",
        "trials",
        "needs",
    ]
    at = {(row["method"], row["share"]): row for row in rows}
    lines = []
    for method in contents["methods"]:
        name = method["name"]
        runs = [
            run for run in contents["runs"] if run["method"] == name and run.get("domain") == domain
        ]
        found = ((contents["frontier"].get(domain) or {}).get(text_name) or {}).get(name) or {}
        if not runs:  # not yet
            continue
        lines.append(
            [
                Cell(label(contents, name), mark=name),
                *(_at_share(at.get((name, share))) for share in shares),
                *_whole(runs, text_name),
                number(found.get("area"), found.get("area_error")),
                *_costs(runs),
                number(method.get("trials"), show=numbers.whole),
                text(method.get("needs")),
            ]
        )
    lead = 1 if shares else 2
    lines.sort(key=lambda line: (line[lead].value is None, line[lead].value or 0.0))
    return made(titles, lines)


def equal(contents: Contents, domain: str, text_name: str) -> Table:
    """Forgetting at equal learning alone, a row per method."""
    rows = equal_rows(contents, domain, text_name)
    shares = sorted({row["share"] for row in rows}, reverse=True)
    at = {(row["method"], row["share"]): row for row in rows}
    lines = [
        [
            Cell(label(contents, name), mark=name),
            *(_at_share(at.get((name, share))) for share in shares),
        ]
        for name in dict.fromkeys(row["method"] for row in rows)
    ]
    lines.sort(key=lambda line: [(cell.value is None, cell.value or 0.0) for cell in line[1:]])
    return made(["method", *(f"forgetting at {numbers.percent(s)}" for s in shares)], lines)


def _at_share(row: Mapping[str, Any] | None) -> Cell:
    """A number; "not reached" where the method never learns that much; the status beside the number
    where only some seeds do.
    """
    if row is None:
        return Cell(numbers.MISSING)
    status, value = str(row.get("status") or ""), numbers.known(row.get("forgetting"))
    if value is None:
        return Cell(status or numbers.MISSING)
    shown = numbers.nats(value, row.get("standard_error"))
    return Cell(
        shown if status in ("", "reached") else f"{shown} ({status})",
        value,
        numbers.known(row.get("standard_error")),
    )


def _whole(runs: Sequence[Mapping[str, Any]], text_name: str) -> list[Cell]:
    """Learning, forgetting and accuracy of the whole update, as means over the reported runs; the
    standard error where there is one run.
    """
    some = _reported(runs)
    points = [
        point for run in some for point in run.get("points") or [] if point.get("scale") == 1.0
    ]
    learning = [point.get("learning") or {} for point in points]
    forgetting = [(point.get("forgetting") or {}).get(text_name) or {} for point in points]
    accuracy = [(point.get("accuracy") or {}) for point in points]
    return [_mean(learning), _mean(forgetting), _mean(accuracy, "after", numbers.share)]


def _reported(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that stand for a method: chosen before others, test before validation."""
    done = [run for run in runs if run.get("status", "done") == "done"]
    for wanted in (
        lambda r: r.get("chosen") and r.get("part") == "test",
        lambda r: r.get("part") == "test",
        lambda r: r.get("chosen"),
    ):
        if some := [run for run in done if wanted(run)]:
            return some
    return done


def _mean(
    entries: Sequence[Mapping[str, Any]], key: str = "nats", show: Any = numbers.nats
) -> Cell:
    values = [value for entry in entries if (value := numbers.known(entry.get(key))) is not None]
    if not values:
        return Cell(numbers.MISSING)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return number(mean, entries[0].get("standard_error"), show)
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
    return number(mean, spread, show)


def _costs(runs: Sequence[Mapping[str, Any]]) -> list[Cell]:
    some = _reported(runs)
    first = some[0] if some else {}
    mean = lambda key: _mean([{"nats": run.get(key)} for run in some])
    seconds, memory = mean("seconds").value, mean("peak_memory_bytes").value
    return [
        number(seconds, show=numbers.duration),
        number(memory, show=numbers.size),
        text(first.get("extra_data")),
        number(first.get("file_bytes"), show=numbers.size),
    ]


def runs(contents: Contents) -> Table:
    """A row per run and scale, failures included."""
    texts = [text["name"] for text in contents["texts"]]
    tasks = list(
        dict.fromkeys(
            name
            for run in contents["runs"]
            for point in run.get("points") or []
            for name in point.get("accuracy_general") or {}
        )
    )
    titles = [
        "method",
        "domain",
        "part",
        "seed",
        "settings",
        "scale",
        "learning",
        *(f"forgetting, {name}" for name in texts),
        "accuracy before",
        "accuracy after",
        *(f"general accuracy, {name}" for name in tasks),
        "energy",
        "seconds",
        "peak memory",
        "chosen",
        "status",
        "run",
    ]
    lines = []
    for run in contents["runs"]:
        status = str(run.get("status") or "done") + (
            f": {run['error']}" if run.get("error") else ""
        )
        for point in run.get("points") or [{}]:
            learned, accuracy = point.get("learning") or {}, point.get("accuracy") or {}
            lost = [(point.get("forgetting") or {}).get(name) or {} for name in texts]
            kept = [(point.get("accuracy_general") or {}).get(name) or {} for name in tasks]
            lines.append(
                [
                    Cell(label(contents, run["method"]), mark=run["method"]),
                    text(run.get("domain")),
                    text(run.get("part")),
                    number(run.get("seed"), show=numbers.whole),
                    text(numbers.settings(run.get("settings"))),
                    number(point.get("scale"), show=numbers.text),
                    number(learned.get("nats"), learned.get("standard_error")),
                    *(number(change.get("nats"), change.get("standard_error")) for change in lost),
                    number(accuracy.get("before"), show=numbers.share),
                    number(accuracy.get("after"), accuracy.get("standard_error"), numbers.share),
                    *(
                        number(score.get("after"), score.get("standard_error"), numbers.share)
                        for score in kept
                    ),
                    number(run.get("energy"), show=numbers.text),
                    number(run.get("seconds"), show=numbers.duration),
                    number(run.get("peak_memory_bytes"), show=numbers.size),
                    text(bool(run.get("chosen"))),
                    text(status),
                    text(str(run.get("id"))[:12]),
                ]
            )
    return made(titles, lines)


def measures(contents: Contents) -> Table:
    """Before and after of a single run."""
    lines = []
    for row in contents["measures"]:
        show = numbers.share if row["unit"] == "share" else numbers.nats
        first, second = numbers.known(row["before"]), numbers.known(row["after"])
        change = None if first is None or second is None else second - first
        name = row["name"] + (f" ({row['unit']})" if row["unit"] not in ("", "share") else "")
        lines.append(
            [
                text(name),
                number(first, show=show),
                number(second, show=show),
                number(change, row["standard_error"], show),
            ]
        )
    return made(["", "before", "after", "change"], lines)


def before(contents: Contents) -> Table:
    """What the base model loses and knows before any run, on every text and domain."""
    lines = []
    for kind, entries in (("general text", contents["texts"]), ("domain", contents["domains"])):
        for entry in entries:
            then = entry.get("before") or {}
            lines.append(
                [
                    text(entry["name"]),
                    text(
                        kind
                        + (
                            " (recorded)"
                            if entry.get("kind") == "recorded" and kind != "domain"
                            else ""
                        )
                    ),
                    number(entry.get("documents", entry.get("rows")), show=numbers.whole),
                    number(entry.get("tokens"), show=numbers.whole),
                    number(then.get("nats"), then.get("standard_error")),
                    number(then.get("perplexity"), show=lambda v: numbers.nats(v, digits=2)),
                    number(then.get("accuracy"), show=numbers.share),
                ]
            )
    return made(
        ["text", "kind", "documents", "tokens", "loss of the base", "perplexity", "accuracy"], lines
    )


def sequences(contents: Contents) -> list[tuple[Mapping[str, Any], Table]]:
    """For each sequence, the loss of every domain before and after each step, then general loss."""
    found = []
    for sequence in contents["sequences"]:
        domains = [str(domain) for domain in sequence.get("domains") or []]
        general = sequence.get("general") or {}
        titles = [
            "after",
            *(f"loss, {domain}" for domain in domains),
            *(f"accuracy, {domain}" for domain in domains),
            *(f"general rise, {name}" for name in general),
        ]
        lines = []
        matrix, accuracy = sequence.get("matrix") or [], sequence.get("accuracy") or []
        for step, name in enumerate(
            (sequence.get("rows") or ["base model", *domains])[: len(matrix)]
        ):
            cells = [number(value) for value in _wide(matrix[step], len(domains))]
            scores = [
                number(value, show=numbers.share)
                for value in _wide(accuracy[step] if step < len(accuracy) else [], len(domains))
            ]
            rises = [number(_rise(values, step, len(matrix))) for values in general.values()]
            lines.append([text(name), *cells, *scores, *rises])
        found.append((sequence, made(titles, lines)))
    return found


def sequence_summary(contents: Contents) -> list[tuple[str, Table]]:
    """For each sequence that several methods or seeds went through, a row per method: where it
    ends, mean over seeds ± standard error, lowest loss first.
    """
    found = []
    for name in dict.fromkeys(str(sequence.get("name")) for sequence in contents["sequences"]):
        mine = [sequence for sequence in contents["sequences"] if str(sequence.get("name")) == name]
        if len(mine) == 1:
            continue
        texts = list(
            dict.fromkeys(text for sequence in mine for text in sequence.get("general") or {})
        )
        titles = [
            "method",
            "average loss",
            "backward transfer",
            "forward transfer",
            *(f"general rise, {text}" for text in texts),
            "average accuracy",
            "backward transfer of accuracy",
            "forward transfer of accuracy",
            "seeds",
        ]
        lines = []
        for method in dict.fromkeys(str(sequence.get("method")) for sequence in mine):
            some = [
                sequence
                for sequence in mine
                if str(sequence.get("method")) == method
                and numbers.known(sequence.get("average")) is not None
            ]
            scored = [sequence.get("accuracy_transfer") or {} for sequence in some]
            rises = [
                _mean(
                    [
                        {"nats": ((sequence.get("general") or {}).get(text) or [None])[-1]}
                        for sequence in some
                    ]
                )
                for text in texts
            ]
            lines.append(
                [
                    Cell(label(contents, method), mark=method),
                    *(_mean(some, key) for key in TRANSFER),
                    *rises,
                    *(_mean(scored, key, numbers.share) for key in TRANSFER),
                    number(len(some), show=numbers.whole),
                ]
            )
        lines.sort(key=lambda line: (line[1].value is None, line[1].value or 0.0))
        found.append((name, made(titles, lines)))
    return found


def _wide(row: Sequence[Any], width: int) -> list[Any]:
    """A row of a matrix with as many places as there are domains."""
    return [*row, *[None] * width][:width]


def _rise(values: Sequence[Any] | None, step: int, rows: int) -> Any:
    """General rise after a step; lists without an entry for the base model start at the first
    domain.
    """
    if values is None:
        return None
    index = step - (rows - len(values))
    return 0.0 if index < 0 else values[index]
