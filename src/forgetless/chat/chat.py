"""`forgetless chat`: talk to a base model and to what was tuned from it, side by side.

    forgetless chat run                                     # type; Ctrl-D or /quit leaves
    forgetless chat run --prompt "Name three fruits."       # one prompt, and the end
    forgetless chat run --prompts FILE --out pairs.jsonl    # many, in batches, into a file

The same prompt goes to both, with the same random numbers (talk.py). A conversation goes on over
several turns, in which each model hears its own answers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.chat.pair import Speaker, find_source, load_speakers
from forgetless.chat.screen import show
from forgetless.chat.talk import (
    Manner,
    Talk,
    as_text,
    chat_openings_of,
    raw_opening,
    with_system,
)
from forgetless.data.documents import load_rows
from forgetless.data.prompts.prompts import Prompt, from_rows
from forgetless.data.selftext import Opening, sample, stop_tokens
from forgetless.errors import OptionError, nearest
from forgetless.files.atomic import write_text
from forgetless.files.outputs import check_new_file, local_inputs
from forgetless.files.untrusted import load_json
from forgetless.model.adapter_tokenizer import tuned_tokenizer
from forgetless.model.loading import context_length, seed_and_threads
from forgetless.options.chat import ChatOptions
from forgetless.report.terminal import progress

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives the line that is typed its editing and history)

logger = logging.getLogger("forgetless")
# Characters of the first row of a file that are read to see whether we wrote it.
LONGEST_ROW = 1 << 24
# What can be typed instead of a prompt.
COMMANDS = {"/new": "begins another conversation", "/quit": "leaves, as Ctrl-D does"}


def chat(options: ChatOptions) -> None:
    """`forgetless chat`: as the options say, one prompt, a file of prompts, or what is typed.

    Raises ValueError or OptionError before a model is loaded where the options cannot work.
    """
    source = find_source(options)
    manner = Manner(
        options.temperature, options.max_tokens, options.seed, options.system, options.raw
    )
    tokenizer = tuned_tokenizer(source.options, source.tuned_folder)
    _check_template(tokenizer, source.options.model, manner)
    if options.prompts:
        prompts = _read_prompts(options.prompts, manner)
        openings = _openings(prompts, tokenizer, manner)
        check_new_file(str(options.out), _is_ours, local_inputs(options))
    seed_and_threads(source.options)
    speakers = load_speakers(source)
    if options.prompts:
        rows = _answer_all(prompts, openings, speakers, tokenizer, manner)
        write_text(
            str(options.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        logger.info("%d pairs of answers: %s", len(rows), options.out)
        return
    talk = Talk(speakers, tokenizer, manner)
    if options.prompt is not None:
        _turn(talk, options.prompt)
    else:
        _converse(talk)


def _check_template(tokenizer: Any, model: str, manner: Manner) -> None:
    """Raise OptionError where the model cannot be asked as the options say."""
    if manner.raw:
        return
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            f"expected a chat model, but the tokenizer of '{model}' has no chat template; --raw "
            "continues each text as it stands"
        )
    # Says before a model is loaded that the template refuses system turns.
    chat_openings_of(
        [with_system(Prompt("own", ({"role": "user", "content": "?"},)), manner.system)], tokenizer
    )


def _read_prompts(file: str, manner: Manner) -> list[Prompt]:
    """The prompts of a file, each with the system prompt where it has none."""
    prompts = [with_system(prompt, manner.system) for prompt in from_rows(load_rows(file), file)]
    if manner.raw and any(len(prompt.messages) > 1 for prompt in prompts):
        raise OptionError(f"--raw expects one text a row, and {file} has conversations")
    return prompts


def _openings(prompts: Sequence[Prompt], tokenizer: Any, manner: Manner) -> list[Opening]:
    """What the models go on from, one for each prompt."""
    if manner.raw:
        return [raw_opening(_last_question(prompt), tokenizer) for prompt in prompts]
    return chat_openings_of(prompts, tokenizer)


def _is_ours(path: Path) -> bool:
    """Whether a file holds pairs of answers that were written here: its first line says so."""
    try:
        with open(path, encoding="utf-8") as file:
            row = load_json(file.readline(LONGEST_ROW))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"prompt", "before", "after"} <= set(row)


def _answer_all(
    prompts: Sequence[Prompt],
    openings: Sequence[Opening],
    speakers: tuple[Speaker, Speaker],
    tokenizer: Any,
    manner: Manner,
) -> list[dict[str, Any]]:
    """A row for each prompt: prompt (and messages, where there are several), before, after."""
    length = _fitting_length(openings, speakers[0], manner)
    said: list[list[str]] = []
    for speaker in speakers:
        with (
            speaker.speaking() as model,
            progress(speaker.name, len(openings), unit="answer") as bar,
        ):
            answers = sample(
                model,
                tokenizer,
                openings,
                seed=manner.seed,
                length=length,
                temperature=manner.temperature,
                done=lambda batch, bar=bar: bar.advance(len(batch)),  # type: ignore[misc]
            )
        stops = stop_tokens(model, tokenizer)
        tokens = [[token for token in answer.scored if token not in stops] for answer in answers]
        said.append([as_text(tokenizer, each) for each in tokens])
    return [
        {**_asked(prompt), "before": before, "after": after}
        for prompt, before, after in zip(prompts, *said, strict=True)
    ]


def _fitting_length(openings: Sequence[Opening], speaker: Speaker, manner: Manner) -> int:
    """Tokens of an answer to any of the openings. Raises OptionError where one has no room."""
    context = context_length(speaker.model)
    longest = max(len(opening.ids) for opening in openings)
    if longest >= context:
        raise OptionError(
            f"the longest prompt has {longest} tokens, and the model's context {context}; shorten "
            "it or take it out"
        )
    return min(manner.max_tokens, context - longest)


def _asked(prompt: Prompt) -> dict[str, Any]:
    """What was asked, as a row holds it."""
    asked: dict[str, Any] = {"prompt": _last_question(prompt)}
    if len(prompt.messages) > 1:
        asked["messages"] = list(prompt.messages)
    return asked


def _last_question(prompt: Prompt) -> str:
    """The last turn of the user."""
    turns: list[Mapping[str, Any]] = [t for t in prompt.messages if t.get("role") == "user"]
    return str(turns[-1]["content"])


def _converse(talk: Talk) -> None:
    """Ask what is typed, until there is no more."""
    known = ", ".join(f"{name} {what}" for name, what in COMMANDS.items())
    logger.info("Type a prompt for both. %s; Ctrl-C stops an answer.", known)
    if talk.manner.raw:
        logger.info("With --raw every prompt is a text of its own.")
    while True:
        try:
            text = _typed()
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            logger.info("\nCtrl-D or /quit leaves.")
            continue
        if re.fullmatch(r"/[a-z]+", text):
            if text == "/quit":
                return
            _obey(talk, text)
        elif text:
            with contextlib.suppress(KeyboardInterrupt):
                _try_turn(talk, text)


def _typed() -> str:
    """One line from standard input; what comes from a pipe is shown, as if it had been typed."""
    line = input("> ")
    if not sys.stdin.isatty():
        print(line, flush=True)
    return line.strip()


def _obey(talk: Talk, command: str) -> None:
    if command == "/new":
        talk.forget()
        logger.info("A new conversation.")
    else:
        logger.info("unknown command '%s'; %s", command, nearest(command, COMMANDS))


def _try_turn(talk: Talk, text: str) -> None:
    """A turn of a conversation, which one that cannot be asked does not end."""
    try:
        _turn(talk, text)
    except OptionError as error:
        logger.info("%s", error)


def _turn(talk: Talk, text: str) -> None:
    """Ask both, show what they say, and keep it, also where Ctrl-C cut it short."""
    talk.cut.clear()
    said: dict[str, str] = {}
    try:
        show({each.name: talk.answer(each, text) for each in talk.speakers}, said)
    except KeyboardInterrupt:
        print(flush=True)
        talk.keep(text, said)
        raise
    talk.keep(text, said)
    if talk.cut:
        names = " and ".join(talk.cut)
        logger.info("%s: cut at the longest answer that --max-tokens or the context allows", names)
