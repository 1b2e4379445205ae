"""Named tasks (SciQ, PIQA, MedMCQA) and domain data of any kind: rows -> prompt, choices, right answer.

A task is a record of small functions over a row with the Hub dataset's fields. The prompts have the form that lm-eval uses, with which the paper
(Song et al. 2025, arXiv 2501.13669) measures its accuracies. `sciq=train.jsonl` reads the same fields from a local file.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from holdfast.config import OptionError, nearest
from holdfast.texts import load_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A multiple-choice task. `choices` are what is ranked after the prompt, without the leading space; `gold` is the index of the right one."""

    name: str
    hub: str
    columns: tuple[str, ...]
    prompt: Callable[[Row], str]
    choices: Callable[[Row], list[str]]
    gold: Callable[[Row], int]


def _sciq_order(row: Row) -> list[int]:
    """A fixed order of [right answer, distractors] for each question, drawn from its text, so that the right one is not always last."""
    order = [0, 1, 2, 3]
    random.Random(hashlib.sha256(str(row["question"]).encode()).digest()).shuffle(order)
    return order


def _sciq_choices(row: Row) -> list[str]:
    answers = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
    return [str(answers[i]) for i in _sciq_order(row)]


def _sciq_prompt(row: Row) -> str:
    return f"{str(row['support']).lstrip()}\nQuestion: {row['question']}\nAnswer:"


def _medmcqa_prompt(row: Row) -> str:
    options = "\n".join(f"{letter}. {row[key]}" for letter, key in zip("ABCD", ("opa", "opb", "opc", "opd"), strict=True))
    return f"Question: {row['question']}\nChoices:\n{options}\nAnswer:"


TASKS = {
    "sciq": Task("sciq", "allenai/sciq", ("question", "correct_answer", "distractor1", "distractor2", "distractor3", "support"),
                 _sciq_prompt, _sciq_choices, lambda row: _sciq_order(row).index(0)),
    "piqa": Task("piqa", "ybisk/piqa", ("goal", "sol1", "sol2", "label"),
                 lambda row: f"Question: {row['goal']}\nAnswer:", lambda row: [str(row["sol1"]), str(row["sol2"])], lambda row: int(row["label"])),
    "medmcqa": Task("medmcqa", "openlifescienceai/medmcqa", ("question", "opa", "opb", "opc", "opd", "cop"),
                    _medmcqa_prompt, lambda row: ["A", "B", "C", "D"], lambda row: int(row["cop"])),
}  # fmt: skip


def find_task(spec: str) -> tuple[Task, str | None] | None:
    """'sciq' or 'sciq=train.jsonl' -> (task, file or None); None where `spec` names no task of ours."""
    name, _, file = spec.partition("=")
    if name in TASKS:
        return TASKS[name], file or None
    if file:
        raise OptionError(f"unknown task '{name}'; {nearest(name, TASKS)}")
    return None


def load_task(spec: str, *, split: str = "train") -> tuple[Task, list[Row]]:
    """The task that `spec` names and its rows, from its file or from the Hub. Raises OptionError for unknown names, ValueError naming missing columns."""
    found = find_task(spec)
    if found is None:
        raise OptionError(f"unknown task '{spec}'; {nearest(spec, TASKS)}")
    task, file = found
    rows = load_rows(file or task.hub, split=split)
    for number, row in enumerate(rows, 1):
        missing = [column for column in task.columns if row.get(column) is None]
        if missing:
            raise ValueError(f"{file or task.hub}, row {number}: task {task.name} expects {', '.join(task.columns)}; "
                             f"missing {', '.join(missing)}, found {', '.join(map(str, row))}")  # fmt: skip
    return task, rows


def load_training_data(spec: str, *, split: str = "train", limit: int | None = None) -> Any:
    """A datasets.Dataset with `prompt` and `completion`, `messages`, or `text`. Raises ValueError naming the columns found."""
    from datasets import Dataset

    if find_task(spec) is not None:
        task, rows = load_task(spec, split=split)
        made = [{"prompt": task.prompt(row), "completion": " " + task.choices(row)[task.gold(row)]} for row in rows]
        return Dataset.from_list(made[:limit])
    rows = load_rows(spec, split=split)
    for columns in (("prompt", "completion"), ("messages",), ("text",)):
        if all(column in rows[0] for column in columns):
            for number, row in enumerate(rows, 1):
                if not all(row.get(column) for column in columns):
                    raise ValueError(f"'{spec}', row {number}: {' and '.join(columns)} must not be empty")
            return Dataset.from_list([{column: row[column] for column in columns} for row in rows[:limit]])
    raise ValueError(f"'{spec}' has the columns {', '.join(map(str, rows[0]))}; expected text, or prompt and completion, or messages; "
                     f"or name a task: {', '.join(f'{name}={spec}' for name in TASKS)}")  # fmt: skip
