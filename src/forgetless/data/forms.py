"""The forms in which people store chats and instructions, and the one that is worked with.

    common_form({"conversations": [{"from": "human", "value": "Hi"}, ...]}, where)   # ShareGPT
    common_form({"instruction": "Add.", "input": "2 3", "output": "5"}, where)       # Alpaca
    renamed(row, {"prompt": "question"}, where)                                      # --columns

Both become {"messages": [turns], "tools": [...] where there are some}. Rows of any other columns
stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from forgetless.data.turns import as_functions, tools_of
from forgetless.errors import FileError, OptionError, nearest
from forgetless.files.untrusted import load_json

# Who speaks in ShareGPT's turns.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
# Speakers whose text is one tool call or a list of them, as JSON.
CALLERS = ("function_call", "tool_call")
# Columns of domain data; the first group that is there is what is learned.
COLUMN_GROUPS: tuple[tuple[str, ...], ...] = (
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("text",),
)
# Columns that `--columns` can name.
OUR_COLUMNS = (*sum(COLUMN_GROUPS, ()), "tools")


def parse_columns(spec: str | None) -> dict[str, str]:
    """'prompt=question,completion=answer' -> {"prompt": "question", "completion": "answer"}."""
    columns: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in (spec or "").split(","))):
        ours, _, theirs = (each.strip() for each in part.partition("="))
        if ours not in OUR_COLUMNS:
            raise OptionError(f"--columns: unknown column '{ours}'; {nearest(ours, OUR_COLUMNS)}")
        if not theirs or ours in columns:
            raise OptionError(
                f"--columns expects one name of yours for each of ours, as prompt=question; found "
                f"'{spec}'"
            )
        columns[ours] = theirs
    return columns


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row with its owner's columns under our names.

    Where these are all that is needed, columns of the other forms are not looked at.
    """
    if not columns:
        return dict(row)
    if missing := [theirs for theirs in columns.values() if theirs not in row]:
        raise FileError(
            f"{where}: --columns names '{missing[0]}', found the columns {', '.join(map(str, row))}"
        )
    enough = any(set(form) <= set(columns) for form in COLUMN_GROUPS)
    hidden = {*columns, *columns.values(), *(sum(COLUMN_GROUPS, ()) if enough else ())}
    others = {key: value for key, value in row.items() if key not in hidden}
    return {ours: row[theirs] for ours, theirs in columns.items()} | others


def common_form(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row of ShareGPT or Alpaca as a row with `messages`, any other row as it is."""
    if "messages" in row or {"prompt", "completion"} <= set(row):
        return dict(row)
    if "conversations" in row:
        return _share_gpt(row, where)
    if {"instruction", "output"} <= set(row):
        return _alpaca(row, where)
    return dict(row)


def _share_gpt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = row["conversations"]
    if isinstance(given, str):
        try:
            given = load_json(given)
        except ValueError as error:
            raise FileError(f"{where}: 'conversations' is text that is no JSON ({error})") from None
    if not isinstance(given, list):
        raise FileError(f"{where}: 'conversations' holds no list of turns")
    said = [_share_gpt_turn(turn, where) for turn in given]
    others = {k: v for k, v in row.items() if k not in ("conversations", "system", "tools")}
    tools = as_functions(tools_of(row.get("tools"), where))
    chat = {"messages": _with_system(row.get("system"), said)}
    return chat | ({"tools": tools} if tools else {}) | others


def _share_gpt_turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn or "role" in turn:
        return turn  # which turns.py checks
    speaker, value = turn["from"], turn.get("value")
    others = {key: inner for key, inner in turn.items() if key not in ("from", "value")}
    if speaker in CALLERS:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _share_gpt_calls(value, where),
        } | others
    if speaker not in SPEAKERS:
        known = ", ".join([*SPEAKERS, *CALLERS])
        raise FileError(f"{where}: a turn is from '{speaker}'; known: {known}")
    return {"role": SPEAKERS[speaker], "content": value} | others


def _share_gpt_calls(value: Any, where: str) -> list[Any]:
    try:
        calls = load_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise FileError(
            f"{where}: expected a function call as JSON, found {str(value)[:80]} ({error})"
        ) from None
    return calls if isinstance(calls, list) else [calls]


def _alpaca(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Instruction and input are what the user says, the input on a line of its own."""
    columns = ("instruction", "input", "output", "system", "history")
    asked, given, answer = (row.get(column) or "" for column in columns[:3])
    if not all(isinstance(text, str) for text in (asked, given, answer)):
        raise FileError(f"{where}: expected text in instruction, input and output")
    if not (asked.strip() or given.strip()) or not answer.strip():
        raise FileError(f"{where}: instruction and output must not be empty")
    said = [
        {"role": role, "content": text}
        for pair in row.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    question = "\n".join(text for text in (asked, given) if text.strip())
    said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    others = {key: value for key, value in row.items() if key not in columns}
    return {"messages": _with_system(row.get("system"), said)} | others


def _with_system(system: Any, said: Iterable[Any]) -> list[Any]:
    return ([{"role": "system", "content": system}] if system else []) + list(said)
