"""What people see in a terminal while they wait and when a verb is done: tables and progress bars.

    print(table(["", "before", "after"], [["general loss", "3.2115", "3.2671"]]))
    with progress("evaluating", 120, unit="window") as bar:
        for window in windows:
            ...
            bar.advance(said=f"loss {loss:.3f}")
    say("trained 240 steps in 3 min 20 s")

Tables and bars are made with rich. A table is text like any other, so that it can be logged, stored
and tested: it holds escape codes only where standard output is a terminal and NO_COLOR is not set.
A bar goes to standard error, and only where that is a terminal; elsewhere a line now and then says
how far a loop is. With --quiet there is neither.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence

from rich import progress as parts
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from forgetless.errors import printable
from forgetless.report.numbers import MISSING, duration

# A cell is a number where it begins as one: '12.3 MiB', '-0.013 ± 0.002', '84.5 %', '16 x 24'.
NUMBER = re.compile(r"[+-]?(\d|\.\d|inf\b|nan\b)")
# What stands where nothing was measured; it says nothing about its column.
NOT_MEASURED = ("", "-", MISSING)
# Seconds between two drawings of a bar: often enough to look alive, too seldom to cost anything.
REDRAWN = 0.1
# Seconds after which a loop says at its end what was done: nobody wonders about less.
SAID_FROM = 2.0
# Seconds between two lines of a loop where no bar is drawn, as in a log file.
HEARTBEAT = 30.0
# Columns of a bar, beside which label, count, times and a loss fit into 80.
BAR_WIDTH = 16
# The bars that are drawn now, and how many loops run inside each other.
_bars: parts.Progress | None = None
_depth = 0


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


def is_quiet() -> bool:
    """Whether only warnings, errors and results are wanted, as with --quiet."""
    return logging.getLogger("forgetless").level > logging.INFO


def say(line: str) -> None:
    """A line of progress on standard error, above the bar where one is drawn.

    It is nothing that a program would read: with --quiet it is left out, and loggers don't get it.
    """
    if not is_quiet():
        write_message(line)


def write_message(line: str) -> None:
    """A line on standard error, above the bar where one is drawn, whatever --quiet says."""
    if _bars is not None:
        _bars.console.print(Text(line), soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


class Bar:
    """The bar of one loop, as `progress` gives it."""

    def __init__(
        self, label: str, unit: str, total: int, done: int, drawn: parts.Progress | None
    ) -> None:
        self.label = label
        self.unit = unit
        self.total = total
        self.done = done
        self.began_at = done
        self.said = ""  # of the last step, behind the bar
        self.started = time.monotonic()
        self.heartbeat: float | None = None  # when a line is next due, where no bar is drawn
        self._drawn = drawn
        self._next = 0.0
        if drawn is not None:
            self._task = drawn.add_task(label, total=total, completed=done, unit=unit, said="")

    def advance(self, count: int = 1, said: str | None = None) -> None:
        """Another `count` units are done; `said` (a loss, a rate) stands behind the bar from now
        on.
        """
        self.done += count
        now = time.monotonic()
        if self._drawn is not None:
            self.said = self.said if said is None else said
            self._drawn.update(self._task, advance=count, said=self.said)
            if now >= self._next:
                self._drawn.refresh()
                self._next = now + REDRAWN
        elif self.heartbeat is not None and now >= self.heartbeat:
            self.heartbeat = now + HEARTBEAT
            say(self._so_far(now, said))

    def expect(self, total: int) -> None:
        """There are `total` units, as is now known."""
        self.total = total
        if self._drawn is not None:
            self._drawn.update(self._task, total=total)

    def _so_far(self, now: float, said: str | None) -> str:
        """'sampling: 128 of 512 answers, about 40 s left'."""
        line = f"{self.label}: {self.done:,} of {self.total:,} {self.unit}s"
        left = self.total - self.done
        if self.done > self.began_at and left > 0:
            each = (now - self.started) / (self.done - self.began_at)
            line += f", about {duration(each * left)} left"
        return line if said is None else f"{line}; {said}"

    def ended(self) -> str:
        """'sampling: 512 answers in 1 min 20 s'."""
        plural = "" if self.done == 1 else "s"
        took = duration(time.monotonic() - self.started)
        return f"{self.label}: {self.done:,} {self.unit}{plural} in {took}"

    def wipe(self) -> None:
        """Take the bar away."""
        if self._drawn is not None:
            self._drawn.refresh()
            self._drawn.remove_task(self._task)


@contextlib.contextmanager
def progress(
    label: str,
    total: int,
    *,
    unit: str = "step",
    done: int = 0,
    shown: bool = True,
    told: bool = True,
) -> Iterator[Bar]:
    """The progress of a loop of `total` units, of which `done` are done already.

    In a terminal it is a bar on standard error with label, units, time so far and time to go, which
    is wiped at the end. Elsewhere a line every HEARTBEAT seconds says how far it is. A loop that
    took SAID_FROM seconds ends with a line that says what was done and how long it took. One loop
    may run inside another: then only the outer one speaks, and both have bars. `told` is false
    where the loop writes lines of its own. Nothing is shown with --quiet, or where `shown` is
    false, as in all processes but the first. No thread runs behind it: it moves only when the loop
    moves it.
    """
    global _depth
    if not shown or is_quiet():
        yield Bar(label, unit, total, done, None)
        return
    speaks = told and _depth == 0
    _depth += 1
    try:
        with _drawn_bars() as bars:
            bar = Bar(label, unit, total, done, bars)
            if speaks:
                bar.heartbeat = bar.started + HEARTBEAT
            try:
                yield bar
            finally:
                bar.wipe()
    finally:
        _depth -= 1
    if speaks and time.monotonic() - bar.started >= SAID_FROM:
        say(bar.ended())


@contextlib.contextmanager
def _drawn_bars() -> Iterator[parts.Progress | None]:
    """The bars of standard error, into which inner loops put theirs too; None where that is no
    terminal.
    """
    global _bars
    if _bars is not None or not sys.stderr.isatty():
        yield _bars
        return
    _bars = parts.Progress(
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(BAR_WIDTH),
        parts.TextColumn("{task.completed:,}/{task.total:,} {task.fields[unit]}s", markup=False),
        parts.TimeElapsedColumn(),
        parts.TimeRemainingColumn(compact=True),
        parts.TextColumn("{task.fields[said]}", markup=False),
        console=Console(file=sys.stderr),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    try:
        with _bars:
            yield _bars
    finally:
        _bars = None
