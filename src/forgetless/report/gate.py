"""The verdicts of `forgetless check` for people: in a terminal, on a page, in markdown.

    print(gate_in_words(run))      # a table of at most 80 columns, and what it means
    gate_table(run.gate)           # a Table for the page and for markdown
    gate_sentences(run.gate)       # what stands beside it

A divergence and the rise of a loss are shown as a rise of perplexity in per cent, as budgets are
written, and in nats where the bound is in nats; a rate and an accuracy in points of a hundred.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from forgetless.files.gate_json import (
    EXCEEDED,
    MET,
    NOT_SHOWN,
    OF_BEHAVIOUR,
    Gate,
    JudgedBound,
)
from forgetless.files.run_json import Run
from forgetless.report import numbers
from forgetless.report.behaviours import shown_tokens, table_as_text
from forgetless.report.budget import LOUD
from forgetless.report.cells import Cell, Table, table_of, text_cell
from forgetless.report.numbers import perplexity_percent

GATE_COLUMNS = ("", "verdict", "change", "95 % interval", "bound", "before")
# The option that gives more of what is counted.
GIVEN_BY = {
    "answers": "--answers",
    "documents": "--general with more text",
    "prompts": "--behaviours, or --prompts FILE with yours",
    "questions": "a larger --limit, or a file with more",
}
# The most per cent of perplexity that are told apart, and nats that are more of them in any case.
MOST_PERCENT, MOST_NATS = 9999, 100.0
# Columns of the terminal that sentences are wrapped at.
WIDTH = 80


def gate_table(gate: Gate, *, loud: bool = False) -> Table:
    """A row for each bound; `loud` as the terminal says a verdict that is not met."""
    rows = [gate_row(each, loud=loud) for each in gate.bounds]
    return table_of(GATE_COLUMNS, rows)


def gate_row(each: JudgedBound, *, loud: bool = False) -> list[Cell]:
    """The cells of one bound."""
    interval = numbers.MISSING
    if each.low is not None and each.high is not None:
        interval = f"{_signed_change(each, each.low)} to {_signed_change(each, each.high)}"
    verdict = LOUD.get(str(each.verdict), "") if loud else str(each.verdict)
    return [
        text_cell(each.name),
        Cell(verdict),
        Cell(
            numbers.MISSING if each.change is None else _signed_change(each, each.change),
            each.change,
        ),
        Cell(interval),
        text_cell(each.bound),
        Cell(numbers.MISSING if each.before is None else _level(each)(each.before), each.before),
    ]


def _level(each: JudgedBound) -> Callable[[float], str]:
    """How a value before is shown: in tokens or in points."""
    return shown_tokens if _is_length(each) else numbers.accuracy


def _is_length(each: JudgedBound) -> bool:
    return each.of == OF_BEHAVIOUR and each.name == "length"


def _signed_change(each: JudgedBound, value: float) -> str:
    """A change with its sign: '+1.32 %' of perplexity, '+0.0131' nats, '-2.0 %' in points, '-22.1'
    tokens.
    """
    if each.in_nats:
        if str(each.bound).endswith("%"):
            return _percent_of_perplexity(value)
        return f"{value:+.4f}"
    return f"{value:+.1f}" if _is_length(each) else f"{100 * value:+.1f} %"


def _percent_of_perplexity(nats: float) -> str:
    """'+1.32 %', '+640 %', and '> 9999 %' of a model that is broken."""
    value = perplexity_percent(min(nats, MOST_NATS))
    if value > MOST_PERCENT:
        return f"> {MOST_PERCENT} %"
    return f"{value:+.0f} %" if value >= 100 else f"{value:+.2f} %"


def gate_in_words(run: Run) -> str:
    """The verdicts for the terminal, none of whose lines is longer than 80 columns, if names are
    not.
    """
    gate = run.gate or Gate()
    lines = [table_as_text(gate_table(gate, loud=True)), ""]
    for sentence in [*gate_sentences(gate), *map(str, run.not_judged or ())]:
        lines += textwrap.wrap(sentence, WIDTH, subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines)


def gate_sentences(gate: Gate) -> list[str]:
    """What stands beside the table: each bound that is not met, and the verdict over all."""
    open_bounds = [each for each in gate.bounds if each.verdict != MET]
    return [*map(bound_sentence, open_bounds), _over_all(gate)]


def bound_sentence(each: JudgedBound) -> str:
    """What is wrong with a bound that is not met, or would decide it."""
    name = str(each.name)
    if each.why is not None:
        return f"{name}: not shown: {each.why}"
    on = f"{each.number:,} {each.counted}" if each.number is not None else str(each.counted)
    if each.verdict == EXCEEDED:
        return f"{name}: exceeded: on {on} none of the interval keeps the bound of {each.bound}"
    more = "more of them"
    if each.more is not None:
        more = f"about {each.more:,} more {each.counted}"
    by = GIVEN_BY.get(str(each.counted), "")
    return (
        f"{name}: not shown: on {on} the bound of {each.bound} lies within the interval; {more} "
        f"would decide ({by})"
    )


def _over_all(gate: Gate) -> str:
    """The verdict over all bounds, and the exit code that follows."""
    counts = ", ".join(f"{gate.count(verdict)} {verdict}" for verdict in (MET, NOT_SHOWN, EXCEEDED))
    end = "passed, exit code 0" if gate.passed else "not passed, exit code 3"
    if gate.verdict == NOT_SHOWN:
        end += " (--strict)" if gate.strict else " (3 with --strict)"
    return f"{LOUD.get(str(gate.verdict), gate.verdict)}: {counts}; {end}"
