"""Two answers as they grow: in two columns of a terminal, or one after the other where there is
none.

    said = {}                                       # filled as the answers grow
    show({"base": growing, "tuned": growing}, said)

In two columns the models take turns, a token each. While they speak, a column that is longer than
the screen shows its end; when both are done it is written whole. Elsewhere (a pipe, a file, a
terminal that is too narrow or that cannot move its cursor) there are no escape codes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

# Columns of a terminal below which two columns of text are hard to read.
NARROWEST = 60
# Lines that the names of the models and what stands below them take.
AROUND = 4


def show(growing: Mapping[str, Iterator[str]], said: dict[str, str]) -> None:
    """Show answers while they grow, each an iterator of its text so far; `said` holds what there is
    of each, also after an interruption.
    """
    console = Console(file=sys.stdout, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal and console.width >= NARROWEST:
        _in_columns(console, growing, said)
    else:
        _one_by_one(growing, said)


def _in_columns(
    console: Console, growing: Mapping[str, Iterator[str]], said: dict[str, str]
) -> None:
    """The answers beside each other, each a token further in turn."""
    said |= dict.fromkeys(growing, "")
    speaking = dict(growing)
    live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with live:
        try:
            while speaking:
                for name in list(speaking):
                    text = next(speaking[name], None)
                    if text is None:
                        del speaking[name]
                    else:
                        said[name] = text
                live.update(_columns(console, said, console.height - AROUND), refresh=True)
        finally:
            live.update(_columns(console, said, None), refresh=True)


def _columns(console: Console, said: Mapping[str, str], lines: int | None) -> RichTable:
    """The answers as columns; of a longer one than `lines` its end."""
    table = RichTable(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0))
    width = console.width // len(said) - 2
    cells = []
    for name, text in said.items():
        table.add_column(name, ratio=1, overflow="fold", header_style="bold")
        wrapped = Text(text).wrap(console, width)
        shown = wrapped if lines is None else wrapped[-max(1, lines) :]
        cells.append(Text("\n").join(shown))
    table.add_row(*cells)
    return table


def _one_by_one(growing: Mapping[str, Iterator[str]], said: dict[str, str]) -> None:
    """One answer below the other, each written as it grows."""
    for name, texts in growing.items():
        print(f"{name}:", flush=True)
        written = ""
        for text in texts:
            if text.startswith(written):
                print(text[len(written) :], end="", flush=True)
                written = text
            said[name] = text
        said.setdefault(name, "")
        print(said[name].removeprefix(written) + "\n", flush=True)
