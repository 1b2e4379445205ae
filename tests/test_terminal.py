"""Tables and progress bars in a terminal."""

import io
import logging
import sys

import pytest

from forgetless.report import terminal as console
from forgetless.report.terminal import progress, say, table


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_table_is_plain_text_with_numbers_to_the_right():
    text = table(["", "loss", "size"], [["general", "3.21", "12 MiB"], ["a [b]x[/b]", "-", 4]])
    assert text.splitlines() == [
        "            loss    size",
        "general     3.21  12 MiB",
        "a [b]x[/b]     -       4",
    ]


def test_a_table_under_its_title():
    assert table(["name"], [["plain"]], title="methods").splitlines() == [
        "methods",
        "name",
        "plain",
    ]
    assert table(["name"], []) == "name"


def test_no_cell_is_cut_or_obeyed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = "w" * 3000
    text = table(["weight", "note"], [[long, "two\nlines \x1b[31mred"]], title=long)
    assert text.count(long) == 2 and "\x1b" not in text and len(text.splitlines()) == 3


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="expected rows of 2 cells, found one of 1"):
        table(["a", "b"], [["x"]])


def test_escape_codes_only_in_a_terminal_that_wants_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b[1m" in table(["a"], [["x"]])
    monkeypatch.setenv("NO_COLOR", "1")
    assert table(["a"], [["x"]]) == "a\nx"


def test_a_bar_is_drawn_only_in_a_terminal(monkeypatch, capsys):
    with progress("working", 3) as bar:
        bar.advance(3, said="loss 1")
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("working", 3, shown=False) as bar:
        bar.advance()
    assert terminal.getvalue() == ""
    with progress("working", 1200, unit="window", done=2) as bar:
        bar.advance(8, said="loss [1]")
    drawn = terminal.getvalue()
    assert "working" in drawn and "10/1,200 windows" in drawn and "loss [1]" in drawn


def test_bars_nest(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("outer", 2) as outer:
        with progress("inner", 2) as inner:
            inner.advance(2)
        outer.advance(2)
    assert "inner" in terminal.getvalue() and "outer" in terminal.getvalue()


def test_a_line_stands_above_the_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("working", 2) as bar:
        bar.advance()
        say("step 1 [done]")
        bar.advance()
    shown = terminal.getvalue()
    assert "step 1 [done]\n" in shown and shown.rindex("working") > shown.index("step 1")


def test_elsewhere_a_loop_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with progress("sampling", 8, unit="answer") as bar:
        for _ in range(4):
            with progress("inner", 1) as inner:
                inner.advance()
            bar.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sampling: 2 of 8 answers, about 3 min 0 s left"
    assert lines[-1].startswith("sampling: 8 answers in") and len(lines) == 5


def test_quick_loops_and_quiet_ones_say_nothing(monkeypatch, capsys):
    with progress("working", 2) as bar:
        bar.advance(2)
    logger = logging.getLogger("forgetless")
    monkeypatch.setattr(logger, "level", logging.WARNING)
    monkeypatch.setattr(console, "SAID_FROM", 0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("working", 2) as bar:
        bar.advance(2)
    say("a line")
    assert capsys.readouterr().err == "" and terminal.getvalue() == ""
