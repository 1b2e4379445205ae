"""The turns of a chat, as chat templates want them.

    turns("[{...}]", "'a.jsonl', row 3")     # [{"role": "user", "content": "weather in Ulm?"}, ...]
    tools_of('[{"name": "weather"}]', where)  # [{"type": "function", "function": {...}}]

A turn has a role and a content: text, a list of parts that are text, or null beside tool calls. A
tool call is {"type": "function", "function": {"name": ..., "arguments": {...}}}; arguments that are
JSON text are read, since templates write a mapping as JSON and would write JSON text as a quoted
string. Keys of a turn that are null are left out, but for its content. Nulls inside arguments stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.errors import FileError, brief
from forgetless.files.untrusted import load_json

# A turn of a chat, as a template takes it.
Turn = dict[str, Any]
# Keys under which a turn holds what the assistant thought before it spoke.
REASONING = ("reasoning_content", "reasoning", "thinking")


def turns(messages: Any, where: str) -> list[Turn]:
    """The chat in `messages`, a list of turns or JSON text of one. Raises FileError."""
    messages = _from_json(messages, where, "a list of chat turns")
    if not isinstance(messages, list):
        messages = [messages]
    return [_checked_turn(turn, where) for turn in messages]


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The schemas of a row's tools, a list or JSON text of one; None where it has none."""
    value = _from_json(value, where, "a list of tools")
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise FileError(f"{where}: 'tools' holds {brief(value)}, expected a list of tools")
    return [dict(tool) for tool in value]


def as_functions(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as OpenAI writes them: a bare function is put into {"type": "function", ...}."""
    if tools is None:
        return None
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
    ]


def _from_json(value: Any, where: str, expected: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return load_json(value)
    except ValueError as error:
        raise FileError(
            f"{where}: expected {expected}, found text that is no JSON ({error})"
        ) from None


def _checked_turn(given: Any, where: str) -> Turn:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise _no_turn(given, where)
    turn = {key: value for key, value in given.items() if value is not None or key == "content"}
    if turn["role"] == "function":
        turn["role"] = "tool"
    if "function_call" in turn:  # as OpenAI wrote it until 2023
        turn["tool_calls"] = [turn.pop("function_call")]
    if calls := _from_json(turn.get("tool_calls"), where, "a list of tool calls"):
        if not isinstance(calls, list):
            raise _no_turn(given, where)
        turn["tool_calls"] = [_call(call, where) for call in calls]
    else:
        turn.pop("tool_calls", None)
    if "content" in turn:
        turn["content"] = _content(turn, where)
    silent = turn.get("tool_calls") or any(turn.get(key) for key in REASONING)
    if not isinstance(turn.get("content"), str) and not silent:
        raise _no_turn(given, where)
    return turn


def _content(turn: Turn, where: str) -> str | None:
    """A turn's content as text: parts that are text are joined, a tool's result becomes JSON."""
    content = turn["content"]
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, (str, Mapping)) for part in content):
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    if turn["role"] == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise _no_turn(turn, where)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form, with its arguments as a mapping."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise FileError(
            f"{where}: expected tool calls {{'function': {{'name': ..., 'arguments': ...}}}}, "
            f"found {str(call)[:80]}"
        )
    arguments = _from_json(inner.get("arguments"), where, "arguments as a JSON object")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise FileError(
            f"{where}: the arguments of {inner['name']} are {brief(arguments)}, expected an object"
        )
    outer = dict(call) if "function" in call else {"type": "function"}
    outer = {key: value for key, value in outer.items() if value is not None}
    return outer | {"function": {**inner, "arguments": dict(arguments)}}


def _no_turn(turn: Any, where: str) -> FileError:
    return FileError(
        f"{where}: expected chat turns {{'role': ..., 'content': ...}} with text in "
        f"both, found {str(turn)[:80]}"
    )


def turn_text(turn: Mapping[str, Any]) -> str:
    """All that a turn says: what was thought, the content, and the tool calls as JSON."""
    said = [turn.get(key) for key in REASONING] + [turn.get("content")]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in calls_of(turn)]
    return "\n".join([text for text in said if isinstance(text, str) and text] + calls)


def calls_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a turn."""
    return turn.get("tool_calls") or []
