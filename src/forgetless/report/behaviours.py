"""Behaviours before and after, as a terminal, a page and markdown show them.

    print(behaviours_in_words(run))      # the tables with what was left out; "" where not measured
    behaviour_table(behaviours)          # a Table for the page and for markdown

A change beyond the noise, whose interval leaves out 0, says whether it is better or worse; one
within the noise says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forgetless.files.behaviours_json import IN_TOKENS, BehaviourChange, KindDivergence
from forgetless.files.run_json import Run
from forgetless.report import numbers
from forgetless.report.cells import Cell, Table, number_cell, table_of, text_cell
from forgetless.report.terminal import table

BEHAVIOUR_COLUMNS = (
    "behaviour",
    "prompts",
    "before",
    "after",
    "change",
    "95 % interval",
    "beyond the noise",
    "wanted",
)
KIND_COLUMNS = ("divergence on answers to", "nats/token", "std.err.", "answers")
# What a change beyond the noise is called where neither way is wanted.
CHANGED = {"other": "changed"}


def behaviour_table(behaviours: Sequence[BehaviourChange]) -> Table:
    """A row per behaviour."""
    return table_of(BEHAVIOUR_COLUMNS, [behaviour_cells(each) for each in behaviours])


def behaviour_cells(each: BehaviourChange) -> list[Cell]:
    """The cells of one behaviour, in the order of BEHAVIOUR_COLUMNS."""
    show = shown_tokens if each.unit == IN_TOKENS else numbers.accuracy
    interval = ""
    if each.low is not None and each.high is not None:
        interval = f"{_with_sign(each.low, show)} to {_with_sign(each.high, show)}"
    return [
        text_cell(each.counts or each.name),
        number_cell(each.prompts, show=numbers.integer),
        number_cell(each.before, show=show),
        number_cell(each.after, show=show),
        Cell(_with_sign(each.change, show), each.change),
        Cell(interval),
        Cell(CHANGED.get(each.verdict, each.verdict)),
        text_cell(each.better),
    ]


def shown_tokens(value: float) -> str:
    """A length of answers."""
    return f"{value:.1f}"


def _with_sign(value: float | None, show: Callable[[float], str]) -> str:
    """A change with its sign, or without one where it is shown as 0."""
    if value is None:
        return numbers.MISSING
    shown = show(abs(value))
    nothing = shown == show(0.0)
    return shown if nothing else f"{'+' if value > 0 else '-'}{shown}"


def kind_table(kinds: Sequence[KindDivergence]) -> Table:
    """A row per kind of prompt."""
    rows = [
        [
            text_cell(each.kind),
            number_cell(each.nats),
            number_cell(each.standard_error),
            number_cell(each.answers, show=numbers.integer),
        ]
        for each in kinds
    ]
    return table_of(KIND_COLUMNS, rows)


def behaviours_in_words(run: Run) -> str:
    """What was measured of a run's behaviours, for the terminal; "" where nothing was."""
    if run.behaviours is None:
        return ""
    parts = ["", table_as_text(behaviour_table(run.behaviours)), *map(str, run.not_judged or [])]
    if run.divergence_by_kind:
        parts += ["", table_as_text(kind_table(run.divergence_by_kind))]
    return "\n".join(parts)


def table_as_text(shown: Table) -> str:
    """A report's table as text for the terminal."""
    columns = [column.title for column in shown.columns]
    return table(columns, [[cell.shown for cell in row] for row in shown.rows])
