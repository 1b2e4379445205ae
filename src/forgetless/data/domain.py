"""Domain data: the rows that a model learns from, which are prompts with completions, chats, or
running text; and what of them a model can read.

    load_training_data("sciq")                   # a DomainRows of prompts and completions
    load_training_data("domain.jsonl")           # with the columns that the file has
    encoded = encode_rows(data, tokenizer)       # token ids, and which of them are scored
    truncation_report(encoded, length, context)  # what is lost where rows are cut

A named task (tasks.py) is learned from its questions with their right answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from forgetless.data.chats import Chat
from forgetless.data.documents import (
    BESIDE_MESSAGES,
    Document,
    Row,
    beside_messages,
    load_rows,
    say_unread,
)
from forgetless.data.encoding import (
    Encoded,
    encode_chat,
    encode_prompted,
    say_left_out,
    text_ids,
)
from forgetless.data.forms import COLUMN_GROUPS, common_form, parse_columns, renamed
from forgetless.data.tasks import TASKS, find_task, load_task
from forgetless.data.turns import Turn, turn_text, turns
from forgetless.errors import FileError, nearest

# Within the length that `truncation_report` advises, this fraction of the rows keeps its end.
ADVISED = 0.95


@dataclass(frozen=True)
class DomainRows(Sequence[Row]):
    """The rows of a domain, each with `prompt` and `completion`, with `messages`, or with `text`.

    A chat's row may also have `tools`, `chat_template_kwargs`, and `prompt_turns` where what
    follows so many turns is learned. Rows stay dictionaries: in one table of Arrow a row would get
    the keys of other rows' tool arguments as nulls.
    """

    name: str
    rows: list[Row]

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        return self.rows[place]

    def __len__(self) -> int:
        return len(self.rows)


def load_training_data(
    spec: str,
    *,
    split: str | None = "train",
    limit: int | None = None,
    columns: str | None = None,
) -> DomainRows:
    """The rows of a domain, the first `limit` of them; `columns` as in `--columns`.

    With `split` None it is the held-out one. Raises ValueError naming the columns found.
    """
    if find_task(spec) is not None:
        return _task_prompts(spec, split, limit)
    try:
        rows = load_rows(spec, split=split or "test", limit=limit)
    except ValueError as error:
        if spec.isidentifier():  # a bare word may be a misspelt task
            raise FileError(f"{error}; as a task: {nearest(spec, TASKS)}") from error
        raise
    names = parse_columns(columns)
    given = rows
    rows = []
    for number, row in enumerate(given, 1):
        where = f"'{spec}', row {number}"
        rows.append(common_form(renamed(row, names, where), where))
    for group in COLUMN_GROUPS:
        if all(column in rows[0] for column in group):
            read = {*group, "prompt_turns", *BESIDE_MESSAGES}
            chats = isinstance(rows[0][group[0]], list) or "messages" in group
            say_unread(spec, rows, read if chats else group)
            return DomainRows(spec, _checked(spec, rows, group)[:limit])
    fitting = [task.name for task in TASKS.values() if set(task.columns) <= set(rows[0])]
    raise FileError(
        f"'{spec}' has the columns {', '.join(map(str, rows[0]))}; expected text, or prompt and "
        "completion, or messages: name yours with --columns prompt=...,completion=...; "
        f"or name a task: {', '.join(f'{name}={spec}' for name in fitting or TASKS)}"
    )


def _task_prompts(spec: str, split: str | None, limit: int | None) -> DomainRows:
    """The questions of a task with their right answers."""
    task, rows = load_task(spec, split=split)
    answered = [
        {"prompt": task.prompt(row), "completion": " " + task.choices(row)[task.gold(row)]}
        for row in rows
    ]
    return DomainRows(spec, answered[:limit])


def _checked(spec: str, rows: list[Row], columns: tuple[str, ...]) -> list[Row]:
    """The rows with the columns that are learned. Raises FileError for what cannot be."""
    return [
        _domain_row(row, columns, f"'{spec}', row {number}") for number, row in enumerate(rows, 1)
    ]


def _domain_row(row: Row, columns: tuple[str, ...], where: str) -> Row:
    for column in columns:
        value = row.get(column)
        if not value or (isinstance(value, str) and not value.strip()):
            raise FileError(f"{where}: {' and '.join(columns)} must not be empty, '{column}' is")
    values = [row[column] for column in columns]
    if columns == ("messages",):
        return _chat_row(turns(values[0], where), row, where)
    if len(columns) == 2 and all(isinstance(value, list) for value in values):
        prompt, completion = (turns(value, where) for value in values)
        return _chat_row(prompt + completion, row, where) | {"prompt_turns": len(prompt)}
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise FileError(
                f"{where}: '{column}' holds {type(value).__name__}, expected text; chats go into "
                "a column 'messages'"
            )
    return dict(zip(columns, values, strict=True))


def _chat_row(messages: list[Turn], row: Row, where: str) -> Row:
    tools, settings = beside_messages(row, where)
    chat: Row = {"messages": messages}
    if tools:
        chat["tools"] = tools
    if settings:
        chat["chat_template_kwargs"] = settings
    if isinstance(row.get("prompt_turns"), int):  # a row that was read before and written again
        chat["prompt_turns"] = row["prompt_turns"]
    return chat


def row_text(row: Mapping[str, Any]) -> str:
    """All of the text of a row of domain data: a prompt with its completion, running text, or the
    turns of a chat.
    """
    if row.get("prompt") is not None:
        return str(row["prompt"] + row["completion"])
    return str(row.get("text") or "\n".join(turn_text(turn) for turn in row["messages"]))


def document_texts(documents: Sequence[Document]) -> list[str]:
    """All of the text of each document, without those that are tokens alone."""
    known = [document for document in documents if document.text or document.messages]
    return [row_text(asdict(document)) for document in known]


def row_answers(row: Mapping[str, Any]) -> list[str]:
    """What a row of domain data teaches to say: a completion, assistant turns, or its text."""
    if row.get("prompt") is not None:
        return [str(row["completion"])]
    if row.get("text") is not None:
        return [str(row["text"])]
    learned = row["messages"][row.get("prompt_turns") or 0 :]
    return [turn_text(turn) for turn in learned if turn["role"] == "assistant"]


def encode_rows(
    data: Sequence[Row], tokenizer: Any, *, completion_only: bool = True, end: str = ""
) -> list[Encoded]:
    """Token ids and scored mask of each row of `load_training_data`.

    `end` closes texts and completions that do not end in it: the end-of-text token in training.
    Says where a chat template leaves out tools or what the assistant thought.
    """
    name = f"'{data.name}', " if isinstance(data, DomainRows) else ""
    encoded: list[Encoded] = []
    chats: list[Chat] = []
    closed = lambda text: text if text.endswith(end) else text + end
    for number, row in enumerate(data, 1):
        if "messages" in row:
            chats.append(chat_of(row, f"{name}row {number}"))
            encoded.append(
                encode_chat(
                    chats[-1],
                    tokenizer,
                    assistant_only=completion_only,
                    prompt_turns=row.get("prompt_turns"),
                )
            )
            continue
        if "prompt" in row:
            ids, scored = encode_prompted(row["prompt"], closed(row["completion"]), tokenizer)
        else:
            ids = text_ids(closed(row["text"]), tokenizer, added_end=False)
            scored = [True] * len(ids)
        encoded.append((ids, scored if completion_only else [True] * len(ids)))
    say_left_out(chats, tokenizer)
    return encoded


def chat_of(row: Row, where: str = "the chat") -> Chat:
    """The chat of a row that has `messages`."""
    return Chat(row["messages"], row.get("tools"), row.get("chat_template_kwargs") or {}, where)


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
    advice = _longer(ends, length, context, rows)
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


def _longer(ends: list[int], length: int, context: int, rows: int) -> str:
    """A length to take instead: the smallest that keeps ADVISED of the rows whole, or where
    `length` does, the smallest that keeps more. `ends` are in ascending order.
    """
    enough = ends[math.ceil(ADVISED * len(ends)) - 1]
    more = next((end for end in ends if end > length), length)
    wanted = min(max(enough, more), context)
    if wanted <= length:
        return f"the model takes at most {context} tokens, so shorten these rows"
    return (
        f"--length {wanted} would keep {sum(end <= wanted for end in ends) / rows:.0%} of "
        f"the rows whole (the model takes at most {context} tokens)"
    )


def _scored_reach(scored: list[bool]) -> tuple[int, int] | None:
    """How many tokens of a row its first and its last scored token need, themselves included.

    None where nothing is scored. The first token of a row is never predicted.
    """
    needed = [place + 1 for place, counts in enumerate(scored) if counts and place]
    return (needed[0], needed[-1]) if needed else None
