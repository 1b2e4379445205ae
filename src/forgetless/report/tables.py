"""What the tables of a report hold: methods, runs, and what was measured before and after."""

from __future__ import annotations

from collections.abc import Sequence

from forgetless.files.compare_json import (
    Comparison,
    DomainBefore,
    EqualLearning,
    MethodFrontier,
    Score,
    TextBefore,
    TrialPoint,
    TrialRun,
)
from forgetless.files.measured_json import Change
from forgetless.files.schema import GENERAL
from forgetless.report import numbers
from forgetless.report.cells import Cell, Table, mean_cell, number_cell, table_of, text_cell
from forgetless.report.contents import label
from forgetless.report.one_run import OF_ONE
from forgetless.report.summary import equal_rows


def methods(contents: Comparison, domain: str, text_name: str) -> Table:
    """A row per method: forgetting at equal learning, then what its whole update learned and lost,
    and what it cost.
    """
    rows = equal_rows(contents, domain, text_name)
    levels = _descending_levels(rows)
    titles = [
        "method",
        *_titles(levels),
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
    at = {(row.method, row.level): row for row in rows}
    curves = (contents.frontier.get(domain) or {}).get(text_name) or {}
    lines = []
    for method in contents.methods:
        name = method.name
        runs = [run for run in contents.runs if run.method == name and run.domain == domain]
        if not runs:  # not yet
            continue
        curve = curves.get(name) or MethodFrontier()
        lines.append(
            [
                Cell(label(contents, name), mark=name),
                *(_at_level(at.get((name, level))) for level in levels),
                *_of_whole_update(runs, text_name),
                number_cell(curve.area, curve.area_error),
                *_costs(runs),
                number_cell(method.trials, show=numbers.integer),
                text_cell(method.needs),
            ]
        )
    lead = 1 if levels else 2
    lines.sort(key=lambda line: (line[lead].value is None, line[lead].value or 0.0))
    return table_of(titles, lines)


def equal(contents: Comparison, domain: str, text_name: str) -> Table:
    """Forgetting at equal learning alone, a row per method."""
    rows = equal_rows(contents, domain, text_name)
    levels = _descending_levels(rows)
    at = {(row.method, row.level): row for row in rows}
    lines = [
        [
            Cell(label(contents, name), mark=name),
            *(_at_level(at.get((name, level))) for level in levels),
        ]
        for name in dict.fromkeys(row.method for row in rows)
    ]
    lines.sort(key=lambda line: [(cell.value is None, cell.value or 0.0) for cell in line[1:]])
    return table_of(["method", *_titles(levels)], lines)


def _descending_levels(rows: Sequence[EqualLearning]) -> list[float]:
    return sorted({row.level for row in rows}, reverse=True)


def _titles(levels: Sequence[float]) -> list[str]:
    return [f"forgetting at {numbers.percent(level)}" for level in levels]


def _at_level(row: EqualLearning | None) -> Cell:
    """A number; "not reached" where the method never learns that much; the status beside the number
    where only some seeds do.
    """
    if row is None:
        return Cell(numbers.MISSING)
    status = str(row.status or "")
    if row.forgetting is None:
        return Cell(status or numbers.MISSING)
    cell = number_cell(row.forgetting, row.standard_error)
    if status in ("", "reached"):
        return cell
    return Cell(f"{cell.shown} ({status})", cell.value, cell.error)


def _of_whole_update(runs: Sequence[TrialRun], text_name: str) -> list[Cell]:
    """Learning, forgetting and accuracy of the whole update, as means over the reported runs; the
    standard error where there is one run.
    """
    points = [point for run in _reported(runs) for point in run.points if point.scale == 1.0]
    forgetting = [point.forgetting.get(text_name) or Change() for point in points]
    accuracy = [point.accuracy or Score() for point in points]
    return [
        _mean_change([point.learning or Change() for point in points]),
        _mean_change(forgetting),
        mean_cell(
            [score.after for score in accuracy],
            accuracy[0].standard_error if accuracy else None,
            numbers.accuracy,
        ),
    ]


def _mean_change(changes: Sequence[Change]) -> Cell:
    error = changes[0].standard_error if changes else None
    return mean_cell([change.nats for change in changes], error)


def _reported(runs: Sequence[TrialRun]) -> list[TrialRun]:
    """The runs that stand for a method: chosen before others, test before validation."""
    done = [run for run in runs if run.done]
    tested = [run for run in done if run.part == "test"]
    chosen_and_tested = [run for run in tested if run.chosen]
    return chosen_and_tested or tested or [run for run in done if run.chosen] or done


def _costs(runs: Sequence[TrialRun]) -> list[Cell]:
    some = _reported(runs)
    seconds = mean_cell([run.seconds for run in some]).value
    memory = mean_cell([run.peak_memory_bytes for run in some]).value
    first = some[0] if some else None
    return [
        number_cell(seconds, show=numbers.duration),
        number_cell(memory, show=numbers.byte_size),
        text_cell(first and first.extra_data),
        number_cell(first and first.file_bytes, show=numbers.byte_size),
    ]


def runs(contents: Comparison) -> Table:
    """A row per run and scale, failures included."""
    texts = [text.name for text in contents.texts]
    lost = ["divergence" if text.diverges else "forgetting" for text in contents.texts]
    points = [point for run in contents.runs for point in run.points]
    tasks = list(dict.fromkeys(name for point in points for name in point.accuracy_general or {}))
    titles = [
        "method",
        "domain",
        "part",
        "seed",
        "settings",
        "scale",
        "learning",
        *(f"{what}, {name}" for what, name in zip(lost, texts, strict=True)),
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
    lines = [
        [*_run_cells(contents, run), *_of_point(point, texts, tasks), *_end(run)]
        for run in contents.runs
        for point in run.points or [TrialPoint()]
    ]
    return table_of(titles, lines)


def _run_cells(contents: Comparison, run: TrialRun) -> list[Cell]:
    """The cells that say which run it is."""
    return [
        Cell(label(contents, run.method), mark=run.method),
        text_cell(run.domain),
        text_cell(run.part),
        number_cell(run.seed, show=numbers.integer),
        text_cell(numbers.settings(run.settings)),
    ]


def _of_point(point: TrialPoint, texts: Sequence[str], tasks: Sequence[str]) -> list[Cell]:
    """The cells of what was measured at one scale of a run's update."""
    learning, accuracy = point.learning or Change(), point.accuracy or Score()
    forgetting = [point.forgetting.get(name) or Change() for name in texts]
    others = [(point.accuracy_general or {}).get(name) or Score() for name in tasks]
    return [
        number_cell(point.scale, show=numbers.shown),
        number_cell(learning.nats, learning.standard_error),
        *(number_cell(change.nats, change.standard_error) for change in forgetting),
        number_cell(accuracy.before, show=numbers.accuracy),
        number_cell(accuracy.after, accuracy.standard_error, numbers.accuracy),
        *(number_cell(score.after, score.standard_error, numbers.accuracy) for score in others),
    ]


def _end(run: TrialRun) -> list[Cell]:
    """The cells of what a run cost and how it ended."""
    status = str(run.status or "done") + (f": {run.error}" if run.error else "")
    return [
        number_cell(run.energy, show=numbers.shown),
        number_cell(run.seconds, show=numbers.duration),
        number_cell(run.peak_memory_bytes, show=numbers.byte_size),
        text_cell(bool(run.chosen)),
        text_cell(status),
        text_cell(str(run.id)[:12]),
    ]


def measures(contents: Comparison) -> Table:
    """Before and after of a single run."""
    lines = []
    for measure in contents.measures:
        show = numbers.accuracy if measure.unit == OF_ONE else numbers.nats
        first, second = numbers.finite(measure.before), numbers.finite(measure.after)
        change = None if first is None or second is None else second - first
        unit = "" if measure.unit in ("", OF_ONE) else f" ({measure.unit})"
        lines.append(
            [
                text_cell(f"{measure.name}{unit}"),
                number_cell(first, show=show),
                number_cell(second, show=show),
                number_cell(change, measure.standard_error, show),
            ]
        )
    return table_of(["", "before", "after", "change"], lines)


def before(contents: Comparison) -> Table:
    """What the base model loses and knows before any run, on every text and domain."""
    lines = []
    for each in contents.texts:
        kind = "the base's own answers" if each.diverges else GENERAL
        kind += " (recorded)" if each.kind == "recorded" else ""
        about = [
            text_cell(each.name),
            text_cell(kind),
            number_cell(each.documents, show=numbers.integer),
        ]
        lines.append(
            [*about, number_cell(each.tokens, show=numbers.integer), *_base_cells(each.before)]
        )
    for domain in contents.domains:
        about = [
            text_cell(domain.name),
            text_cell("domain"),
            number_cell(domain.rows, show=numbers.integer),
        ]
        lines.append([*about, Cell(numbers.MISSING), *_base_cells(domain.before)])
    titles = ["text", "kind", "documents", "tokens", "loss of the base", "perplexity", "accuracy"]
    return table_of(titles, lines)


def _base_cells(before: TextBefore | DomainBefore | None) -> list[Cell]:
    known = before or TextBefore()
    return [
        number_cell(known.nats, known.standard_error),
        number_cell(known.perplexity, show=lambda value: numbers.nats(value, digits=2)),
        number_cell(known.accuracy, show=numbers.accuracy),
    ]
