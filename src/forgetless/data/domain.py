"""Domain data: the rows that a model learns from, which are prompts with completions, chats, or
running text; and what of them a model can read.

    load_training_data("sciq")                   # a datasets.Dataset of prompts and completions
    load_training_data("domain.jsonl")           # with the columns that the file has
    encoded = encode_rows(data, tokenizer)       # token ids, and which of them are scored
    truncation_report(encoded, length, context)  # what is lost where rows are cut

A named task (tasks.py) is learned from its questions with their right answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from forgetless.data.documents import Row, check_messages, load_rows
from forgetless.data.encoding import Encoded, encode_chat, encode_prompted
from forgetless.data.tasks import TASKS, find_task, load_task
from forgetless.errors import FileError, nearest

# Columns of domain data; the first group that is there is what is learned.
DOMAIN_COLUMNS = (("prompt", "completion"), ("messages",), ("text",))
# Within the length that `truncation_report` advises, this fraction of the rows keeps its end.
ADVISED = 0.95


def load_training_data(spec: str, *, split: str | None = "train", limit: int | None = None) -> Any:
    """A datasets.Dataset with `prompt` and `completion`, `messages`, or `text`.

    With `split` None it is the held-out one. Raises ValueError naming the columns found.
    """
    if find_task(spec) is not None:
        return _task_prompts(spec, split, limit)
    try:
        rows = load_rows(spec, split=split or "test")
    except ValueError as error:
        if spec.isidentifier():  # a bare word may be a misspelt task
            raise FileError(f"{error}; as a task: {nearest(spec, TASKS)}") from error
        raise
    for columns in DOMAIN_COLUMNS:
        if all(column in rows[0] for column in columns):
            for number, row in enumerate(rows, 1):
                _check_domain_row(row, columns, f"'{spec}', row {number}")
            return _one_table(spec, rows[:limit], columns)
    fitting = [task.name for task in TASKS.values() if set(task.columns) <= set(rows[0])]
    raise FileError(
        f"'{spec}' has the columns {', '.join(map(str, rows[0]))}; expected text, or prompt and "
        "completion, or messages; "
        f"or name a task: {', '.join(f'{name}={spec}' for name in fitting or TASKS)}"
    )


def _task_prompts(spec: str, split: str | None, limit: int | None) -> Any:
    """The questions of a task with their right answers, as a datasets.Dataset."""
    from datasets import Dataset

    task, rows = load_task(spec, split=split)
    answered = [
        {"prompt": task.prompt(row), "completion": " " + task.choices(row)[task.gold(row)]}
        for row in rows
    ]
    return Dataset.from_list(answered[:limit])


def _one_table(spec: str, rows: list[Row], columns: tuple[str, ...]) -> Any:
    """Some columns of the rows as a datasets.Dataset, which wants one type in each of them."""
    from datasets import Dataset
    from pyarrow import ArrowInvalid, ArrowNotImplementedError, ArrowTypeError

    try:
        return Dataset.from_list([{column: row[column] for column in columns} for row in rows])
    except (ArrowInvalid, ArrowTypeError, ArrowNotImplementedError, UnicodeError) as error:
        raise FileError(
            f"'{spec}': the rows do not make one table ({error}); give every turn the "
            "same keys, with text in them"
        ) from None


def _check_domain_row(row: Row, columns: tuple[str, ...], where: str) -> None:
    """Raise FileError for a row with an empty column or one of another type."""
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
    """All of the text of a row of domain data: a prompt with its completion, running text, or the
    turns of a chat.
    """
    if row.get("prompt") is not None:
        return str(row["prompt"] + row["completion"])
    return str(row.get("text") or "\n".join(turn["content"] for turn in row["messages"]))


def row_answers(row: Mapping[str, Any]) -> list[str]:
    """What a row of domain data teaches to say: a completion, assistant turns, or its text."""
    if row.get("prompt") is not None:
        return [str(row["completion"])]
    if row.get("text") is not None:
        return [str(row["text"])]
    return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]


def encode_rows(
    data: Any, tokenizer: Any, *, completion_only: bool = True, end: str = ""
) -> list[Encoded]:
    """Token ids and scored mask of each row of `load_training_data`.

    `end` closes texts and completions that do not end in it: the end-of-text token in training.
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
    """What cutting every row after `length` tokens loses, with a length that would keep more.

    None where nothing is lost. Raises ValueError where no row keeps a scored token: there would be
    nothing to learn.
    """
    reaches = [reach for _, scored in encoded if (reach := _scored_reach(scored)) is not None]
    rows = len(encoded)
    blank = rows - len(reaches)
    if not reaches:
        raise FileError(
            "no row has a token to score; expected text of at least two tokens, completions, or "
            "chats with assistant turns"
        )
    ends = sorted(end for _, end in reaches)
    cut = sum(end > length for end in ends)
    lost = sum(first > length for first, _ in reaches)
    wanted = min(ends[math.ceil(ADVISED * len(ends)) - 1], context)
    advice = (
        f"--length {wanted} would keep {sum(end <= wanted for end in ends) / rows:.0%} of "
        f"the rows whole (the model takes at most {context} tokens)"
    )
    if lost + blank == rows:
        raise FileError(
            f"within --length {length} no row keeps a token to score, since prompts fill it; "
            f"{advice}"
        )
    parts = []
    if cut:
        parts.append(
            f"{cut} of {rows} rows are longer than --length {length}: {lost} lose all that is "
            f"scored and are left out, {cut - lost} lose the end of it; {advice}"
        )
    if blank:
        parts.append(f"{blank} of {rows} rows have nothing to score and are left out")
    return "; ".join(parts) or None


def _scored_reach(scored: list[bool]) -> tuple[int, int] | None:
    """How many tokens of a row its first and its last scored token need, themselves included.

    None where nothing is scored. The first token of a row is never predicted.
    """
    needed = [place + 1 for place, counts in enumerate(scored) if counts and place]
    return (needed[0], needed[-1]) if needed else None
