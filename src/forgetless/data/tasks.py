"""The named tasks of multiple choice (SciQ, PIQA, MedMCQA), and a user's own questions.

    task, rows = load_task("piqa=test.jsonl")    # to rank the choices of each question
    task.prompt(rows[0]), task.choices(rows[0]), task.gold(rows[0])

A task is a record of small functions over a row with the Hub dataset's fields. The prompts have the
form that lm-eval uses, with which the paper (Song et al. 2025, arXiv 2501.13669) measures its
accuracies. `sciq=train.jsonl` reads the same fields from a local file; `choices=questions.jsonl`
reads rows of a prompt, its choices (a list) and the number of the right one (gold, from 0).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from forgetless.data.documents import Row, load_rows
from forgetless.errors import FileError, OptionError, brief, nearest
from forgetless.options.option import several


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    `choices` are what is ranked after the prompt, without the leading space; `gold` is the index of
    the right one. `held_out` is the split of the Hub dataset with published answers that lm-eval
    measures on; without a Hub dataset (`hub`) a file is needed. `per_byte`: a comparison's accuracy
    ranks choices by likelihood per byte, since they differ in length.
    """

    name: str
    hub: str
    held_out: str
    columns: tuple[str, ...]
    prompt: Callable[[Row], str]
    choices: Callable[[Row], list[str]]
    gold: Callable[[Row], int]
    per_byte: bool = False


def _sciq_order(row: Row) -> list[int]:
    """A fixed order of [right answer, distractors] for a question, drawn from its text, so that the
    right one is not always in the same place.
    """
    order = [0, 1, 2, 3]
    random.Random(hashlib.sha256(str(row["question"]).encode()).digest()).shuffle(order)
    return order


def _sciq_choices(row: Row) -> list[str]:
    answers = [row["correct_answer"], row["distractor1"], row["distractor2"], row["distractor3"]]
    return [str(answers[i]) for i in _sciq_order(row)]


def _sciq_prompt(row: Row) -> str:
    return f"{str(row['support']).lstrip()}\nQuestion: {row['question']}\nAnswer:"


def _medmcqa_prompt(row: Row) -> str:
    options = "\n".join(
        f"{letter}. {row[key]}"
        for letter, key in zip("ABCD", ("opa", "opb", "opc", "opd"), strict=True)
    )
    return f"Question: {row['question']}\nChoices:\n{options}\nAnswer:"


def _own_choices(row: Row) -> list[str]:
    if not isinstance(row["choices"], list):
        raise TypeError
    return [str(choice) for choice in row["choices"]]


TASKS = {
    "sciq": Task(
        "sciq",
        "allenai/sciq",
        "test",
        ("question", "correct_answer", "distractor1", "distractor2", "distractor3", "support"),
        _sciq_prompt,
        _sciq_choices,
        lambda row: _sciq_order(row).index(0),
    ),
    "piqa": Task(
        "piqa",
        "baber/piqa",
        "validation",
        ("goal", "sol1", "sol2", "label"),
        lambda row: f"Question: {row['goal']}\nAnswer:",
        lambda row: [str(row["sol1"]), str(row["sol2"])],
        lambda row: int(row["label"]),
    ),
    "medmcqa": Task(
        "medmcqa",
        "openlifescienceai/medmcqa",
        "validation",
        ("question", "opa", "opb", "opc", "opd", "cop"),
        _medmcqa_prompt,
        lambda row: ["A", "B", "C", "D"],
        lambda row: int(row["cop"]),
    ),
    "choices": Task(
        "choices",
        "",
        "",
        ("prompt", "choices", "gold"),
        lambda row: str(row["prompt"]),
        _own_choices,
        lambda row: int(row["gold"]),
        per_byte=True,
    ),
}


# What `--tasks chat` measures of a chat model: whether it follows instructions, what it knows,
# whether it has sense, and whether it calculates.
CHAT_TASKS = ("ifeval", "arc_easy", "arc_challenge", "winogrande", "gsm8k")


def find_task(spec: str) -> tuple[Task, str | None] | None:
    """'sciq' or 'sciq=train.jsonl' -> (task, file or None); None where it names no task of ours, as
    a file in whose path is a '='.

    Raises OptionError where a file is given for a task that is not ours.
    """
    name, _, file = spec.partition("=")
    if name in TASKS:
        return TASKS[name], file or None
    if file and not os.path.exists(os.path.expanduser(spec)):
        raise OptionError(
            f"unknown task '{name}'; {nearest(name, TASKS)} There is no file '{spec}' either"
        )
    return None


def task_specs(specs: str | None) -> list[str]:
    """'sciq, piqa=test.jsonl' -> ['sciq', 'piqa=test.jsonl']; none of None.

    'chat' stands for CHAT_TASKS, 'chat=FOLDER' for the same from FOLDER/<name>.jsonl.
    """
    every: list[str] = []
    for part in several(specs):
        name, _, folder = part.partition("=")
        if name == "chat":
            every += [f"{task}={folder}/{task}.jsonl" if folder else task for task in CHAT_TASKS]
        else:
            every.append(part)
    return every


def load_task(spec: str, *, split: str | None = "train") -> tuple[Task, list[Row]]:
    """The task that `spec` names and its rows, from its file or from the Hub.

    With `split` None they are those of the task's held-out split. Raises OptionError for unknown
    names, ValueError naming missing columns and rows without an answer.
    """
    known = find_task(spec)
    if known is None:
        raise OptionError(f"unknown task '{spec}'; {nearest(spec, TASKS)}")
    task, file = known
    if not file and not task.hub:
        raise OptionError(f"task {task.name} has no data of its own; give {task.name}=FILE")
    rows = load_rows(file or task.hub, split=split or task.held_out)
    for number, row in enumerate(rows, 1):
        _check_task_row(task, row, f"{file or task.hub}, row {number}")
    return task, rows


def _check_task_row(task: Task, row: Row, where: str) -> None:
    """Raise FileError for a row without a column of the task or without an answer."""
    missing = [column for column in task.columns if row.get(column) is None]
    if missing:
        raise FileError(
            f"{where}: task {task.name} expects {', '.join(task.columns)}; "
            f"missing {', '.join(missing)}, found {', '.join(map(str, row))}"
        )
    try:
        answered = 0 <= task.gold(row) < len(task.choices(row))
    except (TypeError, ValueError, OverflowError):
        answered = False
    if not answered:  # published test splits hide their answers as -1
        raise FileError(
            f"{where}: {task.columns[-1]} is {brief(row[task.columns[-1]])}, which names no "
            f"choice; use a split with answers ({task.held_out})"
        )
