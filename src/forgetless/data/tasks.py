"""Named tasks (SciQ, PIQA, MedMCQA) and domain data of any kind: rows -> prompt, choices, right
answer.

A task is a record of small functions over a row with the Hub dataset's fields. The prompts have the
form that lm-eval uses, with which the paper (Song et al. 2025, arXiv 2501.13669) measures its
accuracies. `sciq=train.jsonl` reads the same fields from a local file.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forgetless.data.documents import check_messages, load_rows
from forgetless.data.encoding import Encoded, encode_chat, encode_prompted
from forgetless.errors import FileError, OptionError, brief, nearest

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    `choices` are what is ranked after the prompt, without the leading space; `gold` is the index of
    the right one. `held_out` is the split of the Hub dataset with published answers that lm-eval
    measures on.
    """

    name: str
    hub: str
    held_out: str
    columns: tuple[str, ...]
    prompt: Callable[[Row], str]
    choices: Callable[[Row], list[str]]
    gold: Callable[[Row], int]


def _sciq_order(row: Row) -> list[int]:
    """A fixed order of [right answer, distractors] for each question, drawn from its text, so that
    the right one is not always last.
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
}


def find_task(spec: str) -> tuple[Task, str | None] | None:
    """'sciq' or 'sciq=train.jsonl' -> (task, file or None); None where `spec` names no task of
    ours.
    """
    name, _, file = spec.partition("=")
    if name in TASKS:
        return TASKS[name], file or None
    if file:
        raise OptionError(f"unknown task '{name}'; {nearest(name, TASKS)}")
    return None


def task_specs(specs: str | None) -> list[str]:
    """'sciq, piqa=test.jsonl' -> ['sciq', 'piqa=test.jsonl']; none of None."""
    return [part.strip() for part in (specs or "").split(",") if part.strip()]


def load_task(spec: str, *, split: str | None = "train") -> tuple[Task, list[Row]]:
    """The task that `spec` names and its rows, from its file or from the Hub (split None: the
    task's held-out one).

    Raises OptionError for unknown names, ValueError naming missing columns and rows without an
    answer.
    """
    found = find_task(spec)
    if found is None:
        raise OptionError(f"unknown task '{spec}'; {nearest(spec, TASKS)}")
    task, file = found
    rows = load_rows(file or task.hub, split=split or task.held_out)
    for number, row in enumerate(rows, 1):
        where = f"{file or task.hub}, row {number}"
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
    return task, rows


def load_training_data(spec: str, *, split: str | None = "train", limit: int | None = None) -> Any:
    """A datasets.Dataset with `prompt` and `completion`, `messages`, or `text`; split None is the
    held-out one. Raises ValueError naming the columns found.
    """
    from datasets import Dataset
    from pyarrow import ArrowInvalid, ArrowNotImplementedError, ArrowTypeError

    if find_task(spec) is not None:
        task, rows = load_task(spec, split=split)
        made = [
            {"prompt": task.prompt(row), "completion": " " + task.choices(row)[task.gold(row)]}
            for row in rows
        ]
        return Dataset.from_list(made[:limit])
    try:
        rows = load_rows(spec, split=split or "test")
    except ValueError as error:
        if spec.isidentifier():  # a bare word may be a misspelt task
            raise FileError(f"{error}; as a task: {nearest(spec, TASKS)}") from error
        raise
    for columns in (("prompt", "completion"), ("messages",), ("text",)):
        if all(column in rows[0] for column in columns):
            for number, row in enumerate(rows, 1):
                _check_row(row, columns, f"'{spec}', row {number}")
            try:
                return Dataset.from_list(
                    [{column: row[column] for column in columns} for row in rows[:limit]]
                )
            except (ArrowInvalid, ArrowTypeError, ArrowNotImplementedError, UnicodeError) as error:
                raise FileError(
                    f"'{spec}': the rows do not make one table ({error}); give every turn the "
                    "same keys, with text in them"
                ) from None
    fitting = [task.name for task in TASKS.values() if set(task.columns) <= set(rows[0])] or list(
        TASKS
    )
    raise FileError(
        f"'{spec}' has the columns {', '.join(map(str, rows[0]))}; expected text, or prompt and "
        "completion, or messages; "
        f"or name a task: {', '.join(f'{name}={spec}' for name in fitting)}"
    )


def _check_row(row: Row, columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        value = row.get(column)
        if not value or (isinstance(value, str) and not value.strip()):
            raise FileError(f"{where}: {' and '.join(columns)} must not be empty, '{column}' is")
        if column == "messages":
            check_messages(value, where)
        elif not isinstance(value, str):
            raise FileError(
                f"{where}: '{column}' holds {type(value).__name__}, expected text; chats go into "
                "a column 'messages'"
            )


def row_text(row: Mapping[str, Any]) -> str:
    """All of the text of a row of training data: running text, a prompt with its completion, or the
    turns of a chat.
    """
    if row.get("prompt") is not None:
        return str(row["prompt"] + row["completion"])
    return str(row.get("text") or "\n".join(turn["content"] for turn in row["messages"]))


def encode_rows(
    data: Any, tokenizer: Any, *, completion_only: bool = True, end: str = ""
) -> list[Encoded]:
    """Token ids and scored mask of each row of `load_training_data`; `end` (the end-of-text token
    in training) closes texts and completions without it.
    """
    encoded: list[Encoded] = []
    closed = lambda text: text if text.endswith(end) else text + end
    for row in data:
        if "messages" in row:
            encoded.append(encode_chat(row["messages"], tokenizer, assistant_only=completion_only))
            continue
        if "prompt" in row:
            ids, scored = encode_prompted(row["prompt"], closed(row["completion"]), tokenizer)
        else:
            ids = list(tokenizer(closed(row["text"]), verbose=False)["input_ids"])
            scored = [True] * len(ids)
        encoded.append((ids, scored if completion_only else [True] * len(ids)))
    return encoded


def truncation_report(encoded: list[Encoded], length: int, context: int) -> str | None:
    """What cutting every row after `length` tokens loses, with a length that would keep more; None
    where nothing is lost.

    Raises ValueError where no row keeps a scored token: there would be nothing to learn.
    """
    targets = [
        [i + 1 for i, one in enumerate(scored) if one and i] for _, scored in encoded
    ]  # tokens that a row needs for each scored one
    rows, blank = len(encoded), sum(not needed for needed in targets)
    if blank == rows:
        raise FileError(
            "no row has a token to score; expected text of at least two tokens, completions, or "
            "chats with assistant turns"
        )
    ends = sorted(needed[-1] for needed in targets if needed)
    cut, lost = (
        sum(end > length for end in ends),
        sum(needed[0] > length for needed in targets if needed),
    )
    wanted = min(ends[math.ceil(0.95 * len(ends)) - 1], context)
    advice = (
        f"--length {wanted} would keep {sum(end <= wanted for end in ends) / rows:.0%} of "
        f"the rows whole (the model takes at most {context} tokens)"
    )
    if lost + blank == rows:
        raise FileError(
            f"within --length {length} no row keeps a token to score, since prompts fill it; "
            f"{advice}"
        )
    parts = [
        f"{cut} of {rows} rows are longer than --length {length}: {lost} lose all that is scored "
        f"and are left out, {cut - lost} lose the end of it; {advice}"
    ]
    parts = (parts if cut else []) + (
        [f"{blank} of {rows} rows have nothing to score and are left out"] if blank else []
    )
    return "; ".join(parts) or None
