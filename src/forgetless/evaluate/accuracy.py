"""Accuracies on multiple-choice tasks: of the named tasks (sciq, piqa, medmcqa) by our own ranking
of the choices, of every other task by lm-eval.

    answers(model, tokenizer, *load_task("sciq=test.jsonl")).numbers     # {"acc": 0.62, ...}
    lm_eval_accuracy(model, tokenizer, "hellaswag", limit=200)           # needs forgetless[tasks]

Both give the accuracy by likelihood (acc) and by likelihood per byte of the choice (acc_norm); the
prompts of the named tasks are those of lm-eval, and the tests compare the two. lm-eval brings 40
packages with it, so it is an extra and is loaded only where a task needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.documents import Row
from forgetless.data.encoding import Encoded, encode_prompted
from forgetless.data.tasks import TASKS, Task, find_task, load_task, task_specs
from forgetless.errors import OptionError, nearest
from forgetless.evaluate.losses import TextLoss, evaluating, last_window, text_loss
from forgetless.files.measured_json import Scores
from forgetless.files.untrusted import JsonObject
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
        "acc_stderr": _standard_error(right),
        "acc_norm": float(np.mean(right_per_byte)),
        "acc_norm_stderr": _standard_error(right_per_byte),
        "questions": len(rows),
    }
    return Scores(accuracies, answer.record())


def _standard_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for a single value."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def lm_eval_accuracy(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    file: str | None = None,
    shots: int = 0,
    limit: int | None = None,
) -> Scores:
    """One lm-eval task on the live model, from the Hub or with its data replaced by a local JSONL
    file; `shots` examples stand before each question.

    Raises OptionError where lm-eval is not installed or does not know the task.
    """
    check_lm_eval(name)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        result = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[_local_task(name, file) if file else name],
            num_fewshot=shots,
            limit=limit,
            task_manager=_task_manager(),
            bootstrap_iters=0,
        )
    numbers = next(iter(result["results"].values()))
    accuracies: dict[str, float | None] = {
        key.replace(",none", ""): value
        for key, value in numbers.items()
        if isinstance(value, (int, float))
    }
    return Scores(accuracies)


def _local_task(name: str, file: str) -> JsonObject:
    """lm-eval's settings of a task, with its data replaced by a local JSONL file."""
    splits = {split: str(Path(file).resolve()) for split in ("train", "validation", "test")}
    return {
        **_task_manager().task_index[name].cfg,
        "task": f"{name}-local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
    }


def check_tasks(specs: str | None, *, shots: int = 0) -> None:
    """Raise OptionError or ValueError for unknown tasks and unreadable task files, before any model
    is loaded. With `shots` examples before each question, every task is lm-eval's.
    """
    for spec in task_specs(specs):
        name, _, file = spec.partition("=")
        named = find_task(spec) is not None
        if named and file:
            load_task(spec)
        if shots > 0 or not named:
            check_lm_eval(name)


def check_lm_eval(name: str) -> None:
    """Raise OptionError where lm-eval is not installed, or knows no task of this name."""
    if importlib.util.find_spec("lm_eval") is None:
        known = ", ".join(TASKS)
        raise OptionError(
            f"task '{name}' is measured by lm-eval, which is not installed; expected {known} "
            "without --shots, or lm-eval: pip install 'forgetless[tasks]'"
        )
    known_there = _task_manager().all_tasks
    if name not in known_there:
        raise OptionError(f"unknown task '{name}'; {nearest(name, [*TASKS, *known_there])}")


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of tasks, which takes seconds to make, hence once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
