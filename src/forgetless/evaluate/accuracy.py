"""Accuracies on multiple-choice tasks: of the named tasks (sciq, piqa, medmcqa) by our own ranking
of the choices, of every other task by lm-eval.

    answers(model, tokenizer, *load_task("sciq=test.jsonl")).numbers     # {"acc": 0.62, ...}

The accuracies are by likelihood (acc) and by likelihood per byte of the choice (acc_norm); the
prompts of the named tasks are those of lm-eval, and the tests compare the two (harness.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.documents import Row
from forgetless.data.encoding import Encoded, encode_prompted
from forgetless.data.tasks import TASKS, Task, load_task, task_specs
from forgetless.evaluate.harness import check_lm_eval
from forgetless.evaluate.losses import TextLoss, last_window, text_loss
from forgetless.evaluate.paired_scores import standard_error_of_mean
from forgetless.files.measured_json import Scores
from forgetless.model.loading import context_length


def answers(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
) -> Scores:
    """Loss on the right answers, and accuracy by ranking the choices by likelihood (acc) and by
    likelihood per byte (acc_norm), with standard errors over questions.

    Raises ValueError for a choice of which no token can be scored.
    """
    window = context_length(model)
    pieces: list[Encoded] = []
    sizes: list[int] = []  # bytes of each choice
    for row in rows:
        for choice in task.choices(row):
            piece = encode_prompted(task.prompt(row), " " + choice, tokenizer)
            pieces.append(last_window(piece, window))
            sizes.append(len(choice.encode()))
    loss = text_loss(model, pieces, window=window, batch_tokens=batch_tokens, label=task.name)
    if len(loss.nats_by_document) != len(pieces):
        raise ValueError(
            f"task {task.name}: {len(pieces) - len(loss.nats_by_document)} choices have no token "
            "to score; remove these rows"
        )
    return _ranked(task, rows, loss, np.array(sizes))


def _ranked(task: Task, rows: Sequence[Row], loss: TextLoss, sizes: np.ndarray) -> Scores:
    """Whether the right choice of each question is the likeliest; `loss` and `sizes` have the
    choices of all questions one after another, (choices,).
    """
    right: list[float] = []
    right_per_byte: list[float] = []
    answered: list[int] = []  # where the right choice of each question stands
    first = 0
    for row in rows:
        count = len(task.choices(row))
        gold = task.gold(row)
        nats = loss.nats_by_document[first : first + count]
        right.append(float(nats.argmin() == gold))
        right_per_byte.append(float((nats / sizes[first : first + count]).argmin() == gold))
        answered.append(first + gold)
        first += count
    answer = TextLoss(loss.nats_by_document[answered], loss.tokens_by_document[answered])
    accuracies = {
        "acc": float(np.mean(right)),
        "acc_stderr": standard_error_of_mean(right),
        "acc_norm": float(np.mean(right_per_byte)),
        "acc_norm_stderr": standard_error_of_mean(right_per_byte),
        "questions": len(rows),
    }
    return Scores(accuracies, answer.record(), {"acc": [*right], "acc_norm": [*right_per_byte]})


def check_tasks(specs: str | None, *, shots: int = 0) -> None:
    """Raise OptionError or ValueError for unknown tasks and unreadable task files, before any model
    is loaded. With `shots` examples before each question, every task is lm-eval's.
    """
    for spec in task_specs(specs):
        name, _, file = spec.partition("=")
        if name in TASKS and file:
            load_task(spec)
        if shots > 0 or name not in TASKS:
            check_lm_eval(name, file or None)
