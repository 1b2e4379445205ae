"""Prompts of ours, to which a chat model answers what it would say anyway.

Its answers are the text on which forgetting is measured and against which it is held, so nobody
needs the data that made the model. The prompts stand in one JSON-lines file a kind beside this
module; a row is

    messages    the chat up to where the assistant would answer
    language    optional: the code of the language that the answer should be in, such as "de"
    tools       optional: the schemas of tools that the model may call
    thinking    optional: true for a prompt that is asked twice, with the thinking switch on and off
    expects     optional: what a good answer looks like, as evaluate/behaviours.py judges it

    prompts = load_prompts()                      # all of ours
    parts = parted(prompts)                       # {"record": ..., "control": ..., "check": ...}
    usable, left_out = supported(parts["check"], tokenizer)

The parts are disjoint and hold every kind in the same proportion. A prompt's part follows from its
text alone, so it stays where it is when others are added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgetless.data.forms import common_form
from forgetless.data.turns import tools_of
from forgetless.errors import FileError, brief
from forgetless.files.provenance import sha256_text

# Where our own prompts lie.
FOLDER = Path(__file__).parent
# Importance and anchors are made of half of the prompts; the rest measures, a quarter while
# training and a quarter afterwards.
DEALT = ("record", "control", "record", "check")
OWN = "own"  # the kind of a user's prompts that name none

# What `expects` may hold where evaluate/behaviours.py reads it; more is let through.
KINDS_OF_EXPECTS: dict[str, type] = {
    **dict.fromkeys(("language", "code", "answer", "call"), str),
    **dict.fromkeys(("starts_with", "ends_with", "contains", "lacks", "lines_start"), str),
    **dict.fromkeys(("uppercase", "lowercase", "no_call"), bool),
    "max_words": int,
    "json": list,
}
KINDS_IN_WORDS = {str: "text", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True)
class Prompt:
    """A chat up to where the assistant would answer."""

    kind: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool | None = None  # the position of the thinking switch; None leaves it alone
    language: str | None = None
    expects: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All that the model is given, in one canonical form."""
        return json.dumps([self.messages, self.tools], ensure_ascii=False, sort_keys=True)

    @property
    def id(self) -> str:
        """Sixteen hex digits that follow from what the model is given."""
        key = f"{self.text}{'' if self.thinking is None else self.thinking}"
        return sha256_text(key)[:16]


def load_prompts(folder: Path = FOLDER) -> list[Prompt]:
    """Every prompt of the JSON-lines files in `folder`; the name of a file is its prompts' kind."""
    prompts: list[Prompt] = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        prompts += from_rows(rows, str(path), kind=path.stem)
    return prompts


def from_rows(rows: Iterable[Mapping[str, Any]], place: str, *, kind: str = OWN) -> list[Prompt]:
    """Prompts from rows with `messages` or `prompt`, and what else the module names.

    Assistant turns at the end of `messages` are somebody else's answers and are left out. Raises
    FileError with the row for one that holds neither column, or no user turn.
    """
    prompts = []
    for number, row in enumerate(rows, 1):
        where = f"{place}, row {number}"
        row = common_form(row, where)
        messages = _turns(row, where)
        positions = (True, False) if row.get("thinking") else (None,)
        for thinking in positions:
            prompts.append(
                Prompt(
                    kind=str(row.get("kind") or kind),
                    messages=messages,
                    tools=tuple(tools_of(row.get("tools"), where) or ()),
                    thinking=thinking,
                    language=_language(row, where),
                    expects=_expects(row, where),
                )
            )
    if not prompts:
        raise FileError(f"{place}: expected prompts, found no row")
    return prompts


def _language(row: Mapping[str, Any], place: str) -> str | None:
    language = row.get("language")
    if language is None or isinstance(language, str):
        return language
    raise FileError(f"{place}: 'language' holds {brief(language)}, expected a code such as de")


def _expects(row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """What a good answer looks like. Raises FileError for what no behaviour is judged by."""
    expects = row.get("expects") or {}
    if not isinstance(expects, Mapping):
        raise FileError(f"{place}: 'expects' holds {brief(expects)}, expected a mapping")
    for name, kind in KINDS_OF_EXPECTS.items():
        value = expects.get(name)
        fits = name not in expects or isinstance(value, kind)
        if kind is list and isinstance(value, list):
            fits = all(isinstance(each, str) for each in value)
        if not fits:
            what = (
                f"a list of text, such as {{'{name}': ['a']}}"
                if kind is list
                else KINDS_IN_WORDS[kind]
            )
            raise FileError(f"{place}: 'expects.{name}' holds {brief(value)}, expected {what}")
    return expects


def _turns(row: Mapping[str, Any], place: str) -> tuple[Mapping[str, Any], ...]:
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
        columns = ", ".join(sorted(row)) or "none"
        raise FileError(f"{place}: expected a column 'messages' or 'prompt', found {columns}")
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not any(turn.get("role") == "user" for turn in messages):
        raise FileError(f"{place}: expected a user turn, found none")
    return tuple(messages)


def parted(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The three disjoint parts of prompts: 'record', 'control' and 'check'.

    Prompts of the same chat with the thinking switch on and off stay together.
    """
    kinds: dict[str, dict[str, list[Prompt]]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind, {}).setdefault(prompt.text, []).append(prompt)
    parts: dict[str, list[Prompt]] = {part: [] for part in DEALT}
    for chats in kinds.values():
        ordered = sorted(chats, key=lambda text: hashlib.sha256(text.encode()).digest())
        for place, text in enumerate(ordered):
            parts[DEALT[place % len(DEALT)]] += chats[text]
    return parts


def prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of the prompt by the tokenizer's chat template, up to where the answer begins."""
    switch = {} if prompt.thinking is None else {"enable_thinking": prompt.thinking}
    ids = tokenizer.apply_chat_template(
        list(prompt.messages),
        tools=list(prompt.tools) or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        **switch,
    )
    return list(ids)


def supported(
    prompts: Sequence[Prompt], tokenizer: Any
) -> tuple[list[Prompt], dict[str, list[Prompt]]]:
    """(prompts that the tokenizer's chat template can put to the model, reason -> those it can't).

    Raises FileError for a tokenizer without a chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FileError(
            "chat is sampled through the model's chat template, and its tokenizer has none; give "
            "--general self for text sampled without a template, or a text file"
        )
    usable: list[Prompt] = []
    left_out: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        reason = _why_not(prompt, tokenizer)
        if reason is None:
            usable.append(prompt)
        else:
            left_out.setdefault(reason, []).append(prompt)
    return usable, left_out


def _why_not(prompt: Prompt, tokenizer: Any) -> str | None:
    """Why the template cannot put a prompt to the model; None where it can."""
    try:
        ids = prompt_ids(prompt, tokenizer)
    except Exception as error:  # a template raises whatever its author chose
        roles = {str(turn.get("role")) for turn in prompt.messages}
        what = "system turns" if "system" in roles else "such chats"
        return f"the template refuses {what} ({str(error).splitlines()[0][:80]})"
    if prompt.tools and ids == prompt_ids(replace(prompt, tools=()), tokenizer):
        return "the template shows the model no tools"
    if prompt.thinking is not None:
        other = replace(prompt, thinking=not prompt.thinking)
        if ids == prompt_ids(other, tokenizer):
            return "the template has no thinking switch"
    return None
