"""Tables as the page and markdown show them: what is shown in each cell, and the whole number
behind it for sorting and for CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.report import numbers


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
class Headline:
    """One number, what it says, where it was measured, and whether the difference is beyond the
    noise, in words.
    """

    number: str
    phrase: str
    detail: str
    place: str
    noise: str = ""


@dataclass(frozen=True)
class Column:
    """A column; its standard errors, where it has some, are a column of their own in CSV."""

    title: str
    number: bool = True
    errors: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under their columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def table_of(titles: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """A table without the columns in which nothing was measured; a column is of numbers where any
    cell has one.
    """
    filled = [
        at
        for at in range(len(titles))
        if any(row[at].shown not in (numbers.MISSING, "") for row in rows)
    ]
    columns = tuple(
        Column(
            titles[at],
            any(row[at].value is not None for row in rows),
            any(row[at].error is not None for row in rows),
        )
        for at in filled
    )
    return Table(columns, tuple(tuple(row[at] for at in filled) for row in rows))


def number_cell(value: Any, error: Any = None, show: Callable[..., str] = numbers.nats) -> Cell:
    """A cell with a number, as `show` shows it."""
    known, spread = numbers.finite(value), numbers.finite(error)
    shown = show(known) if spread is None else show(known, spread)
    return Cell(shown, known, spread)


def text_cell(value: Any) -> Cell:
    """A cell with any plain value as text."""
    return Cell(numbers.shown(value))


def mean_cell(
    values: Sequence[float | None],
    error: float | None = None,
    show: Callable[..., str] = numbers.nats,
) -> Cell:
    """The mean of what is known with its standard error; `error` is that of a lone value."""
    known = [value for value in map(numbers.finite, values) if value is not None]
    if not known:
        return Cell(numbers.MISSING)
    average = sum(known) / len(known)
    if len(known) == 1:
        return number_cell(average, error, show)
    square = sum((value - average) ** 2 for value in known)
    return number_cell(average, (square / (len(known) - 1) / len(known)) ** 0.5, show)
