"""What the tables of sequences hold: every domain after each step, and where each method ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forgetless.files.compare_json import ComparedSequence, Comparison
from forgetless.files.run_json import Transfer
from forgetless.report import numbers
from forgetless.report.cells import Cell, Table, mean_cell, number_cell, table_of, text_cell
from forgetless.report.contents import diverges, label


def sequences(contents: Comparison) -> list[tuple[ComparedSequence, Table]]:
    """For each sequence, the loss of every domain before and after each step, then general loss."""
    return [(sequence, _matrix(contents, sequence)) for sequence in contents.sequences or []]


def _title_of_lost(contents: Comparison, text: str) -> str:
    """What a column says of a general text: how its loss rose, or how far the model moved."""
    return f"divergence, {text}" if diverges(contents, text) else f"general rise, {text}"


def _matrix(contents: Comparison, sequence: ComparedSequence) -> Table:
    domains = [str(domain) for domain in sequence.domains]
    titles = [
        "after",
        *(f"loss, {domain}" for domain in domains),
        *(f"accuracy, {domain}" for domain in domains),
        *(_title_of_lost(contents, name) for name in sequence.general),
    ]
    matrix, accuracy = sequence.matrix, sequence.accuracy or []
    names = (sequence.rows or ["base model", *domains])[: len(matrix)]
    lines = []
    for step, name in enumerate(names):
        scores = accuracy[step] if step < len(accuracy) else []
        rises = [_rise_after(values, step, len(matrix)) for values in sequence.general.values()]
        lines.append(
            [
                text_cell(name),
                *(number_cell(value) for value in _to_width(matrix[step], len(domains))),
                *(
                    number_cell(value, show=numbers.accuracy)
                    for value in _to_width(scores, len(domains))
                ),
                *(number_cell(rise) for rise in rises),
            ]
        )
    return table_of(titles, lines)


def _to_width(row: Sequence[Any], width: int) -> list[Any]:
    """A row of a matrix with as many places as there are domains."""
    return [*row, *[None] * width][:width]


def _rise_after(values: Sequence[float | None] | None, step: int, rows: int) -> float | None:
    """General rise after a step; lists without an entry for the base model start at the first
    domain.
    """
    if values is None:
        return None
    index = step - (rows - len(values))
    return 0.0 if index < 0 else values[index]


def sequence_summary(contents: Comparison) -> list[tuple[str, Table]]:
    """For each sequence that several methods or seeds went through, a row per method: where it
    ends, mean over seeds ± standard error, lowest loss first.
    """
    by_name: dict[str, list[ComparedSequence]] = {}
    for sequence in contents.sequences or []:
        by_name.setdefault(str(sequence.name), []).append(sequence)
    return [(name, _ends(contents, some)) for name, some in by_name.items() if len(some) > 1]


def _ends(contents: Comparison, sequences: Sequence[ComparedSequence]) -> Table:
    """A row per method of one sequence."""
    texts = list(dict.fromkeys(name for sequence in sequences for name in sequence.general))
    titles = [
        "method",
        "average loss",
        "backward transfer",
        "forward transfer",
        *(_title_of_lost(contents, name) for name in texts),
        "average accuracy",
        "backward transfer of accuracy",
        "forward transfer of accuracy",
        "seeds",
    ]
    lines = []
    for method in dict.fromkeys(str(sequence.method) for sequence in sequences):
        of_method = [sequence for sequence in sequences if str(sequence.method) == method]
        ended = [sequence for sequence in of_method if sequence.average is not None]
        lines.append(
            [
                Cell(label(contents, method), mark=method),
                *_transfers(ended),
                *(mean_cell([_last(sequence, name) for sequence in ended]) for name in texts),
                *_transfers([each.accuracy_transfer or Transfer() for each in ended], of_one=True),
                number_cell(len(ended), show=numbers.integer),
            ]
        )
    lines.sort(key=lambda line: (line[1].value is None, line[1].value or 0.0))
    return table_of(titles, lines)


def _transfers(
    sequences: Sequence[ComparedSequence | Transfer], *, of_one: bool = False
) -> list[Cell]:
    """Average, backward and forward transfer, as means over seeds; `of_one`: of accuracies."""
    show = numbers.accuracy if of_one else numbers.nats
    return [
        mean_cell([each.average for each in sequences], show=show),
        mean_cell([each.backward_transfer for each in sequences], show=show),
        mean_cell([each.forward_transfer for each in sequences], show=show),
    ]


def _last(sequence: ComparedSequence, name: str) -> float | None:
    """The rise on a general text at the end of a sequence."""
    values = sequence.general.get(name)
    return values[-1] if values else None
