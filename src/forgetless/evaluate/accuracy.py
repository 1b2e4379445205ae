"""TODO evaluate.accuracy."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from forgetless.data.encoding import encode_prompted
from forgetless.data.tasks import TASKS, Row, Task, find_task, load_task, task_specs
from forgetless.errors import OptionError, nearest
from forgetless.evaluate.losses import TextLoss, evaluating, last_window, text_loss
from forgetless.model.loading import context_length


def answers(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Loss on the right answers, and accuracy by ranking the choices by likelihood (acc) and by
    likelihood per byte (acc_norm), with standard errors.
    """
    window = context_length(model)
    pieces, sizes = [], []
    for row in rows:
        for choice in task.choices(row):
            pieces.append(
                last_window(encode_prompted(task.prompt(row), " " + choice, tokenizer), window)
            )
            sizes.append(len(choice.encode()))
    loss = text_loss(model, pieces, window=window, batch_tokens=batch_tokens, label=task.name)
    if len(loss.nats_by_document) != len(pieces):
        raise ValueError(
            f"task {task.name}: {len(pieces) - len(loss.nats_by_document)} choices have no token "
            "to score; remove these rows"
        )
    right, right_norm, gold_nats, gold_tokens, place = [], [], [], [], 0
    for row in rows:
        count, gold = len(task.choices(row)), task.gold(row)
        nats = loss.nats_by_document[place : place + count]
        right.append(float(nats.argmin() == gold))
        right_norm.append(float((nats / np.array(sizes[place : place + count])).argmin() == gold))
        gold_nats.append(nats[gold])
        gold_tokens.append(loss.tokens_by_document[place + gold])
        place += count
    answer = TextLoss(np.array(gold_nats), np.array(gold_tokens))
    error = lambda values: (
        float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    )
    return {
        "acc": float(np.mean(right)),
        "acc_stderr": error(right),
        "acc_norm": float(np.mean(right_norm)),
        "acc_norm_stderr": error(right_norm),
        "questions": len(rows),
        "answer_loss": answer.numbers(),
    }


def lm_eval_accuracy(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    file: str | None = None,
    shots: int = 0,
    limit: int | None = None,
) -> dict[str, Any]:
    """One lm-eval task on the live model through `HFLM`, from the Hub or with its data replaced by
    a local JSONL file.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    check_tasks(name)
    manager = _task_manager()
    task: Any = name
    if file:
        splits = {split: str(Path(file).resolve()) for split in ("train", "validation", "test")}
        task = {
            **manager.task_index[name].cfg,
            "task": f"{name}-local",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": splits},
        }
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        result = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[task],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
    numbers = next(iter(result["results"].values()))
    return {
        key.replace(",none", ""): value
        for key, value in numbers.items()
        if isinstance(value, (int, float))
    }


def check_tasks(specs: str | None) -> None:
    """Raise OptionError or ValueError for unknown tasks and unreadable task files, before any model
    is loaded.
    """
    for spec in task_specs(specs):
        name, _, file = spec.partition("=")
        if find_task(spec) is not None:
            if file:
                load_task(spec)
        elif name not in (known := _task_manager().all_tasks):
            raise OptionError(f"unknown task '{name}'; {nearest(name, [*TASKS, *known])}")


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of tasks: takes seconds to make, hence once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
