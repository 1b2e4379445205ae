"""What each step of a sequence did to every domain: measured after each, as matrices and as lines
of text.

    row = measured(options, domains, "run/steps/1/adapter", Path("run/steps/1/measured.json"))
        # the base with one adapter
    sequence_of([base, row], ["sciq"], [1])      # what run.json holds under `sequence`

Costs an evaluation of everything per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.data.inputs import read_held_out
from forgetless.data.tasks import find_task, load_task
from forgetless.evaluate.accuracy import answers
from forgetless.evaluate.evaluate import measure
from forgetless.evaluate.losses import TextLoss
from forgetless.evaluate.paired_answers import paired_part
from forgetless.files.measured_json import (
    Interval,
    Loss,
    MeasuredDomain,
    MeasuredRow,
    Scores,
)
from forgetless.files.run_json import Refactored, SequenceMatrix, SequenceStep, Transfer
from forgetless.files.schema import as_record, read_plain, write_record
from forgetless.model.adapter_files import with_adapter
from forgetless.model.loading import load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.options.tune import TuneOptions
from forgetless.sequence.domains import Domain
from forgetless.sequence.transfer import of_accuracy, transfer

# What is kept of the accuracies on a domain that is a task.
ACCURACIES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


def measured(
    options: TuneOptions, domains: Sequence[Domain], adapter: str | None, path: Path
) -> MeasuredRow:
    """General text, tasks and every domain, of the base with one adapter as anybody would load it;
    read from `path` where this was measured before.
    """
    if path.exists():
        return as_record(read_plain(path), MeasuredRow)
    torch.manual_seed(options.seed)
    tokenizer, model = load_tokenizer(options), load_to_train(options)
    held_out = read_held_out(options, tasks=options.tasks, limit=options.limit)
    own = paired_part(model, tokenizer, held_out.own, "check")
    if adapter:
        model = with_adapter(model, adapter)
    state = measure(model, tokenizer, held_out, own=own, is_base=not adapter)
    every = {domain.name: _measured_domain(options, model, tokenizer, domain) for domain in domains}
    row = MeasuredRow(state.general, state.domain, state.tasks, state.own, every)
    write_record(path, row)
    return row


def _measured_domain(
    options: TuneOptions, model: nn.Module, tokenizer: Any, domain: Domain
) -> MeasuredDomain:
    """The loss on the held-out rows of one domain, and the accuracy where it is a task."""
    split = domain.held_split
    held_out = read_held_out(data=domain.held, data_split=split, limit=options.limit)
    loss = measure(model, tokenizer, held_out).domain
    assert loss is not None
    accuracy = None
    if find_task(domain.held) is not None:
        task, rows = load_task(domain.held, split=split)
        scored = answers(model, tokenizer, task, rows[: options.limit]).numbers
        accuracy = Scores({key: scored[key] for key in ACCURACIES})
    return MeasuredDomain(**vars(loss), accuracy=accuracy)


def sequence_of(
    rows: Sequence[MeasuredRow],
    domains: Sequence[str],
    learned: Sequence[int],
    *,
    held: Mapping[str, Any] | None = None,
    steps: Sequence[SequenceStep] = (),
) -> SequenceMatrix:
    """The matrices, transfer and the rise of general loss (from the base) after each row of
    measurements.

    `held` and `steps` are told along with them: the held-out rows of each domain, and each step.
    """
    cells = [[row.domains[name] for name in domains] for row in rows]
    matrix: Any = [[cell.nats for cell in row] for row in cells]
    scored = [[_accuracy_on(cell) for cell in row] for row in cells]
    total = Transfer(**transfer(matrix, learned))
    with_choices = [j for j in range(len(domains)) if scored[0][j] is not None]
    accuracy: Any = None
    accuracy_transfer = None
    if with_choices:
        accuracy = [[row[j] for j in with_choices] for row in scored]
        at = [learned[j] for j in with_choices]
        accuracy_transfer = Transfer(**of_accuracy(accuracy, at, steps=max(learned)))
    after = [
        ", ".join(name for name, at in zip(domains, learned, strict=True) if at == row)
        for row in range(1, len(rows))
    ]
    general = [row.general for row in rows if row.general is not None]
    return SequenceMatrix(
        domains=list(domains),
        learned=list(learned),
        rows=["base model", *after],
        matrix=matrix,
        standard_error=[[cell.standard_error for cell in row] for row in cells],
        average=total.average,
        backward_transfer=total.backward_transfer,
        forward_transfer=total.forward_transfer,
        accuracy_domains=[domains[j] for j in with_choices],
        accuracy=accuracy,
        accuracy_transfer=accuracy_transfer,
        general=_rises(general) if general else None,
        general_nats=[loss.nats for loss in general] if general else None,
        held=dict(held or {}),
        steps=list(steps),
    )


def _accuracy_on(domain: MeasuredDomain) -> float | None:
    """The accuracy on a domain that is a task."""
    return domain.accuracy.numbers["acc"] if domain.accuracy else None


def _rises(losses: Sequence[Loss]) -> list[Interval]:
    """How much each loss has risen since the first one."""
    base = TextLoss.of(losses[0])
    return [base.rise(TextLoss.of(loss)).record() for loss in losses]


def lines(sequence: SequenceMatrix) -> list[str]:
    """The matrix and what follows from it, as text."""
    names = sequence.domains
    labels = ["base model", *(f"after {name}" for name in sequence.rows[1:])]
    width = max(map(len, [*labels, "nats per token"])) + 2
    wide = max(10, *(len(name) + 2 for name in names))

    def table(
        title: str, columns: Sequence[str], rows: Sequence[Sequence[float | None]], number: str
    ) -> list[str]:
        head = f"{title:<{width}}" + "".join(f"{name:>{wide}}" for name in columns)
        return [
            head,
            *(
                f"{labels[i]:<{width}}" + "".join(f"{value:>{wide}{number}}" for value in row)
                for i, row in enumerate(rows)
            ),
        ]

    general = sequence.general_nats
    if general:
        matrix = [[*row, general[i]] for i, row in enumerate(sequence.matrix)]
        result = table("nats per token", [*names, "general"], matrix, ".4f")
    else:
        result = table("nats per token", names, sequence.matrix, ".4f")
    if sequence.accuracy:
        result += table("accuracy", sequence.accuracy_domains, sequence.accuracy, ".3f")
    if sequence.refactored is not None:
        result.append(_smaller(sequence.refactored))
    return [*result, _in_a_line(sequence)]


def _smaller(adapter: Refactored) -> str:
    """What the final adapter at a smaller rank is worth."""
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in adapter.losses.items())
    return (
        f"the final adapter at rank {adapter.rank}: relative error {adapter.error:.3f} "
        f"of the update; {losses}"
    )


def _in_a_line(sequence: SequenceMatrix) -> str:
    """Where the sequence ends on average, its transfer, and the rise of general loss."""
    said = "".join(
        f"; {name} {value:+.4f}"
        for name, value in (
            ("backward transfer", sequence.backward_transfer),
            ("forward transfer", sequence.forward_transfer),
        )
        if value is not None
    )
    rise = f"; general loss {sequence.general[-1].nats:+.4f}" if sequence.general else ""
    return f"average {sequence.average:.4f}{said} (above 0 is good){rise}, in nats per token"
