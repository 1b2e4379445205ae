"""A chat as the tokenizer's chat template writes it, and whether the template writes all of it.

    chat = Chat(messages, tools, where="'chats.jsonl', row 3")
    written = fitted(chat, tokenizer)        # the chat in the form in which the template writes all
    ids = templated(tokenizer, written)      # as TRL tokenises it

A template writes what its author thought of. Many leave out tool calls, tools or a text that does
not come as they expect it, and then a model learns to answer with nothing. So each turn is looked
for in what the template wrote. Where one is missing, the chat is tried in the other forms that mean
the same: arguments as JSON text, no content as null or as empty text, text as a list of parts. A
chat that no form saves is refused with its row.

What the assistant thought is left out of earlier turns by many templates, as its makers trained the
model; that is counted and not refused.

Cost: one more rendering of each chat, without its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from forgetless.data.turns import REASONING, Turn, calls_of
from forgetless.errors import FileError

# The end of what models think before they answer, in text that holds it.
END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Chat:
    """The turns of a chat with what the template is given beside them; `where` names its row."""

    messages: list[Turn]
    tools: list[dict[str, Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # such as enable_thinking
    where: str = "the chat"

    def upto(self, count: int) -> Chat:
        """The chat of the first turns."""
        return replace(self, messages=self.messages[:count])


def templated(
    tokenizer: Any, chat: Chat, *, prompt: bool = False, template: str | None = None
) -> list[int]:
    """Token ids of a chat by the tokenizer's template, or by another.

    With `prompt` they end where the assistant would begin to answer.
    """
    return list(_apply(tokenizer, chat, template, prompt=prompt, tokenize=True, return_dict=False))


def marked(tokenizer: Any, chat: Chat, template: str) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them the template's {% generation %} markers enclose."""
    output = _apply(
        tokenizer,
        chat,
        template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(output["input_ids"]), [bool(bit) for bit in output["assistant_masks"]]


def _apply(
    tokenizer: Any, chat: Chat, template: str | None, *, prompt: bool = False, **how: Any
) -> Any:
    """What transformers makes of a chat. Raises FileError with the chat's row for what a template
    raises, which is whatever its author chose.
    """
    try:
        return tokenizer.apply_chat_template(
            chat.messages,
            chat_template=template,
            tools=chat.tools,
            add_generation_prompt=prompt,
            **how,
            **chat.settings,
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{chat.where}: the chat template refuses the chat ({first})") from error


def fitted(chat: Chat, tokenizer: Any, template: str | None = None) -> Chat:
    """The chat in the first form of which the template writes everything.

    Raises FileError with the row and what is missing where there is none.
    """
    refusal: FileError | None = None
    for form in _forms(chat):
        try:
            _check_written(form, tokenizer, template)
            return form
        except FileError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _forms(chat: Chat) -> Iterator[Chat]:
    """The chat as it is, then as other templates expect it."""
    yield chat
    calls = any(calls_of(turn) for turn in chat.messages)
    if calls:
        yield _changed(chat, _arguments_as_text)
        yield _changed(chat, _other_nothing)
        yield _changed(chat, _arguments_as_text, _other_nothing)
    yield _changed(chat, _as_parts)


def _changed(chat: Chat, *changes: Callable[[Turn], Turn]) -> Chat:
    messages = chat.messages
    for change in changes:
        messages = [change(turn) for turn in messages]
    return replace(chat, messages=messages)


def _arguments_as_text(turn: Turn) -> Turn:
    if not calls_of(turn):
        return turn
    as_text = lambda function: {
        **function,
        "arguments": json.dumps(function["arguments"], ensure_ascii=False),
    }
    calls = [call | {"function": as_text(call["function"])} for call in calls_of(turn)]
    return turn | {"tool_calls": calls}


def _other_nothing(turn: Turn) -> Turn:
    """No content as null where it is empty text, as empty text where it is null."""
    if turn.get("content"):
        return turn
    return turn | {"content": None if turn.get("content") == "" else ""}


def _as_parts(turn: Turn) -> Turn:
    if not isinstance(turn.get("content"), str):
        return turn
    return turn | {"content": [{"type": "text", "text": turn["content"]}]}


def _check_written(chat: Chat, tokenizer: Any, template: str | None) -> None:
    """Raise FileError unless each turn stands in what the template writes.

    Turns are looked for in their order, but for those between two turns of the user: some templates
    write the results of tools before the text that came with the call.
    """
    text = _apply(tokenizer, chat, template, tokenize=False)
    furthest = 0
    reached: dict[str, int] = {}  # where the last of each kind of turn ended
    for number, turn in enumerate(chat.messages, 1):
        place = f"{chat.where}: the chat template leaves out what turn {number} ({turn['role']}) "
        role = turn["role"]
        if role == "user":
            reached = dict.fromkeys(("user", "assistant", "tool", "calls"), furthest)
        if _text_of_content(turn).strip():
            end = _found(text, _text_of_content(turn), reached.get(role, 0), role == "system")
            if end < 0:
                raise FileError(
                    f"{place}says, so the model would learn to say nothing or to answer nothing; "
                    "use a model whose template writes it, or leave the row out"
                )
            reached[role] = end
        for call in calls_of(turn):
            end = _call_found(text, call["function"], reached.get("calls", 0))
            if end < 0:
                raise FileError(
                    f"{place}calls ({call['function']['name']}); use a model whose template "
                    "writes tool calls, or leave the row out"
                )
            reached["calls"] = end
        furthest = max([furthest, *reached.values()])
    if any("content" in turn and turn["content"] is None for turn in chat.messages):
        _check_no_none(chat, tokenizer, template, text)


def _text_of_content(turn: Turn) -> str:
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _found(text: str, said: str, start: int, anywhere: bool = False) -> int:
    """Where the first of the spellings of `said` ends in `text` from `start` on; -1 for nowhere.

    Of what is said after a thought, the answer is enough. A system turn may stand anywhere.
    """
    pieces = [said] + ([said.rpartition(END_OF_THOUGHT)[2]] if END_OF_THOUGHT in said else [])
    for piece in filter(None, map(str.strip, pieces)):
        for spelling in _spellings(piece):
            place = text.find(spelling, start)
            if place >= 0:
                return place + len(spelling)
            if anywhere and spelling in text:
                return start
    return -1


def _spellings(said: str) -> list[str]:
    """How templates write a text: as it is, or inside a JSON string."""
    inside = json.dumps(said, ensure_ascii=False)[1:-1]
    return list(dict.fromkeys([said, inside, json.dumps(said)[1:-1]]))


def _call_found(text: str, function: Mapping[str, Any], start: int) -> int:
    """Where a tool call ends in `text` from `start` on: its name, then every argument; or -1."""
    start = _found(text, function["name"], start)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    elif arguments and start >= 0:
        # A template that writes a mapping without making JSON of it writes Python.
        python = repr(arguments)
        if python != json.dumps(arguments, ensure_ascii=False) and python in text[start:]:
            return -1
    ends = [start]
    for leaf in _leaves(arguments):
        # Arguments may come in another order, as templates with XML sort them.
        ends.append(_found(text, leaf, start) if start >= 0 else -1)
    return -1 if min(ends) < 0 else max(ends)


def _leaves(value: Any) -> Iterator[str]:
    """The keys, texts and numbers in arguments, which every way of writing them has."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _check_no_none(chat: Chat, tokenizer: Any, template: str | None, text: str) -> None:
    """Raise FileError where the template writes "None" for a content that is null."""
    silent = _apply(tokenizer, _changed(chat, _null_as_empty), template, tokenize=False)
    if text.count("None") > silent.count("None"):
        raise FileError(f"{chat.where}: the chat template writes 'None' for a turn without content")


def _null_as_empty(turn: Turn) -> Turn:
    return turn if turn.get("content") else turn | {"content": ""}


def tools_are_shown(chat: Chat, tokenizer: Any) -> bool:
    """Whether the template writes anything of the tools."""
    bare = replace(chat, tools=None)
    return bool(
        _apply(tokenizer, chat, None, tokenize=False)
        != _apply(tokenizer, bare, None, tokenize=False)
    )


def dropped_thoughts(chat: Chat, tokenizer: Any, template: str | None = None) -> int:
    """In how many turns the template leaves out what the assistant thought."""
    thoughts = [thought_of(turn) for turn in chat.messages]
    if not any(thoughts):
        return 0
    text = _apply(tokenizer, chat, template, tokenize=False)
    return sum(bool(thought) and _found(text, thought, 0) < 0 for thought in thoughts)


def thought_of(turn: Turn) -> str:
    """What the assistant thought before it spoke, in a key of its own or inside the content."""
    said = _text_of_content(turn)
    kept_apart = [str(turn[key]) for key in REASONING if turn.get(key)]
    inside = (
        said.rpartition(END_OF_THOUGHT)[0].rpartition("<think>")[2]
        if END_OF_THOUGHT in said
        else ""
    )
    return (kept_apart[0] if kept_apart else inside).strip()
