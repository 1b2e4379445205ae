"""What people see in a terminal while they wait and when a verb is done: tables and progress bars.

    print(table(["", "before", "after"], [["general loss", "3.2115", "3.2671"]]))
    with progress("evaluating", 120, unit="window", leave=False) as bar:
        for window in windows:
            ...
            bar.advance(said=f"loss {loss:.3f}")

Both are made with rich. A table is text like any other, so that it can be logged, stored and
tested: it holds escape codes only where standard output is a terminal and NO_COLOR is not set. A
bar goes to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich import progress as parts
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from forgetless.errors import printable
from forgetless.report.numbers import MISSING

# A cell is a number where it begins as one: '12.3 MiB', '-0.013 ± 0.002', '84.5 %', '16 x 24'.
NUMBER = re.compile(r"[+-]?(\d|\.\d|inf\b|nan\b)")
# What stands where nothing was measured; it says nothing about its column.
NOT_MEASURED = ("", "-", MISSING)
# Seconds between two drawings of a bar: often enough to look alive, too seldom to cost anything.
REDRAWN = 0.1


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None
) -> str:
    """A table as text, two spaces between its columns, without a line end.

    Cells are shown by `str`, on one line each, and are never cut: where the terminal is narrower
    than the table, its lines wrap. A column is aligned to the right where all that is known in it
    is numbers.

    Raises ValueError for a row that is longer or shorter than `columns`.
    """
    cells = [[printable(cell, longest=sys.maxsize) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"expected rows of {len(columns)} cells, found one of {len(row)}")
    shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at, name in enumerate(columns):
        numbers = _is_of_numbers([row[at] for row in cells])
        shown.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True)
    for row in cells:
        shown.add_row(*map(Text, row))
    widths = [max(map(cell_len, each)) + 2 for each in zip(columns, *cells, strict=True)]
    lines = _drawn(shown, sum(widths))
    if title is not None:
        heading = Text(printable(title, longest=sys.maxsize), style="bold")
        lines = [*_drawn(heading, cell_len(title) + 1), *lines]
    return "\n".join(lines)


def _is_of_numbers(cells: Sequence[str]) -> bool:
    known = [cell for cell in cells if cell not in NOT_MEASURED]
    return bool(known) and all(NUMBER.match(cell) for cell in known)


def _drawn(what: RichTable | Text, width: int) -> list[str]:
    """Lines of what rich draws, as wide as it needs, for standard output as it is now."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    console = Console(
        file=io.StringIO(),
        width=max(1, width),
        color_system="standard" if coloured else None,
        force_terminal=coloured,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(what, soft_wrap=isinstance(what, Text))
    return [line.rstrip() for line in capture.get().splitlines()]


class Bar:
    """The bar of one loop, as `progress` gives it."""

    def __init__(self, drawn: parts.Progress, task: parts.TaskID) -> None:
        self._drawn = drawn
        self._task = task
        self._next = 0.0

    def advance(self, count: int = 1, said: str | None = None) -> None:
        """Another `count` units are done; `said` (a loss, a rate) stands behind the bar from now
        on.
        """
        if said is None:
            self._drawn.update(self._task, advance=count)
        else:
            self._drawn.update(self._task, advance=count, said=said)
        if (now := time.monotonic()) >= self._next:
            self._drawn.refresh()
            self._next = now + REDRAWN


@contextlib.contextmanager
def progress(
    label: str,
    total: int,
    *,
    unit: str = "step",
    done: int = 0,
    leave: bool = True,
    shown: bool = True,
) -> Iterator[Bar]:
    """A progress bar on standard error for a loop of `total` units, of which `done` are done
    already: label, bar, units, time so far and time to go.

    Nothing is drawn where standard error is not a terminal, or where `shown` is false, as in all
    processes but the first. The bar is wiped at the end unless `leave`. One bar may run inside
    another. No thread runs behind it: it moves only when the loop moves it.
    """
    drawn = parts.Progress(
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        parts.TextColumn("{task.completed:,}/{task.total:,} {task.fields[unit]}s", markup=False),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(),
        parts.TextColumn("{task.fields[said]}", markup=False),
        console=_console(sys.stderr),
        auto_refresh=False,
        transient=not leave,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (shown and sys.stderr.isatty()),
    )
    task = drawn.add_task(label, total=total, completed=done, unit=unit, said="")
    with drawn:
        yield Bar(drawn, task)
        drawn.refresh()


@functools.lru_cache(maxsize=1)
def _console(stream: TextIO) -> Console:
    """One console for all bars on a stream, so that they know of each other where they nest."""
    return Console(file=stream)
