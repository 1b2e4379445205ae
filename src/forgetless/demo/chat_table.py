"""The table and the conversations of the demo on a chat model, as markdown."""

from __future__ import annotations

from collections.abc import Sequence

from forgetless.demo.chat_result import ChatDemo, ChatState
from forgetless.files.compare_json import Sample
from forgetless.report import numbers
from forgetless.report.markdown import plain

# What a column of the table and a line of a conversation is called.
CALLED = {"base": "before", "plain": "plain", "plain, halved": "plain, halved", "hold": "held"}


def chat_table(result: ChatDemo) -> str:
    """A column for each state of the model, a row for each thing that was measured."""
    states = result.states
    head = ["", *(CALLED[name] for name in states)]
    rows = [
        ["learned, nats per token", *(_nats_or_dash(state.learning) for state in states.values())],
        [
            "moved from the base, nats per token",
            *(_nats_or_dash(s.divergence) for s in states.values()),
        ],
        *_behaviour_rows(states),
        ["seconds of training", *(_seconds(state.seconds) for state in states.values())],
    ]
    widths = [max(len(line[place]) for line in (head, *rows)) for place in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (head, rule, *rows):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _behaviour_rows(states: dict[str, ChatState]) -> list[list[str]]:
    """A row for each behaviour that was judged of plain and held."""
    names = dict.fromkeys(name for state in states.values() for name in state.behaviours)
    return [
        [plain(name), *(_rate(state.behaviours.get(name)) for state in states.values())]
        for name in names
    ]


def _nats_or_dash(value: float | None) -> str:
    return "-" if value is None else numbers.nats(value)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def side_by_side(samples: Sequence[Sample]) -> str:
    """The conversations, each with what every model says."""
    lines = []
    for sample in samples:
        lines += ["", f"**{plain(sample.prompt or '')}** ({plain(sample.domain or '')})", ""]
        for name, said in sample.outputs.items():
            lines.append(f"* {CALLED.get(name, name)}: {plain(said or '')}")
    return "\n".join(lines).strip()
