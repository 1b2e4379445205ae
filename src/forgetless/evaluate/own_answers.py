"""The text that a model would say anyway: its own answers, in three parts, sampled once and kept.

    wanted = OwnText("chat")
    answers = own_answers(model, tokenizer, wanted, "check")     # list[Answer]
    documents = as_documents(answers)            # of data/selftext.py: to record on, or to replay

Forgetting is the divergence from the base on what the base itself would say, so nobody needs the
data that made the model. `record` reads the part "record"; what a run is held by and scaled to is
"control", what is measured at its end "check". The parts are answers to different prompts.

Whatever the seed of a run, the answers are the same: they belong to the base model. They lie in the
cache, in one file for each state of the weights and each length, so that nothing is sampled twice
and an interrupted sampling goes on where it was.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.data.documents import load_rows
from forgetless.data.own_text import CHAT, SELF, OwnText
from forgetless.data.prompts.prompts import Prompt, from_rows, load_prompts, parted, supported
from forgetless.data.selftext import (
    Answer,
    Opening,
    bare_openings,
    chat_openings,
    read_lines,
    sample,
    seconds_to_sample,
    stop_tokens,
    write_lines,
)
from forgetless.errors import OptionError
from forgetless.files.cache import cached_file
from forgetless.files.lock import in_turn
from forgetless.files.provenance import sha256_text
from forgetless.model import distributed
from forgetless.model.fingerprint import exact_fingerprint
from forgetless.model.loading import context_length
from forgetless.report.numbers import duration
from forgetless.report.terminal import progress

logger = logging.getLogger("forgetless")
# Why a kind of own text is taken where nothing is given.
OWN_WORDS = {
    CHAT: "the model's own answers to prompts of ours (chat), since it has a chat template",
    SELF: "text that the model writes by itself (self), since it has no chat template",
}
# The answers belong to the model and not to a run, so no option changes their random numbers.
ANSWERS_SEED = 0
# An answer of so many tokens on average says nothing: the model ends at once, or the template is
# not its own.
FEWEST_TOKENS = 2
# From so many tokens on it is said how long sampling takes: 20 to 60 s on a CPU with the real model
# of 0.1B.
WORTH_TIMING = 2048


def default_kind(tokenizer: Any) -> str:
    """What stands for a model's general ability where nothing is given: chat, where it has a
    template for it.
    """
    return CHAT if has_template(tokenizer) else SELF


def has_template(tokenizer: Any) -> bool:
    """Whether a model can be talked to: its tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def own_answers(
    model: nn.Module, tokenizer: Any, wanted: OwnText, part: str, *, sampling: bool = True
) -> list[Answer]:
    """The answers of one part by the bare base model, from the cache or sampled now; without
    `sampling` from the cache alone.

    Raises FileError or OptionError where the model cannot be asked, or says nothing.
    """
    length = answer_length(model, wanted.length)
    openings = own_openings(model, tokenizer, wanted, part)
    answers = cached_answers(
        model, tokenizer, openings, length, f"{wanted.kind}, {part}", sampling=sampling
    )
    _check_said(answers, wanted, length)
    return answers


def own_openings(model: nn.Module, tokenizer: Any, wanted: OwnText, part: str) -> list[Opening]:
    """What the model is to go on from, one for each answer of a part.

    Raises FileError or OptionError where it cannot be asked.
    """
    if wanted.kind == SELF:
        return bare_openings(tokenizer, [f"{part} {i}" for i in range(wanted.answers)])
    prompts = chosen_prompts(wanted, tokenizer, part)
    return fitting_openings(model, tokenizer, prompts, answer_length(model, wanted.length))


def answer_length(model: nn.Module, wanted: int) -> int:
    """Tokens of an answer at most: half of the model's context is left to prompts."""
    return min(wanted, context_length(model) // 2)


def chosen_prompts(wanted: OwnText, tokenizer: Any, part: str) -> list[Prompt]:
    """The prompts of one part that the model's template can put to it: all of the user's, and ours.

    Which of ours does not depend on how many are asked for: a larger number holds the smaller.
    """
    ours = sorted(parted(load_prompts())[part], key=lambda prompt: sha256_text(prompt.id))
    usable, left_out = supported(ours, tokenizer)
    for reason, prompts in left_out.items():
        kinds = ", ".join(sorted({prompt.kind for prompt in prompts}))
        _say_once(logging.INFO, f"prompts are left out ({kinds}): {reason}")
    return [*users_prompts(wanted.prompts, tokenizer, part), *usable[: wanted.answers]]


def users_prompts(file: str | None, tokenizer: Any, part: str) -> list[Prompt]:
    """The prompts of one part of a user's file; none without a file.

    Raises OptionError where the model's template cannot put one of them to it.
    """
    if file is None:
        return []
    given = from_rows(load_rows(file), file)
    own, refused = supported(parted(given)[part], tokenizer)
    if refused:
        reason, prompts = next(iter(refused.items()))
        raise OptionError(
            f"--prompts {file}: {len(prompts)} prompts cannot be put to this model: {reason}; "
            "take them out"
        )
    return own


def fitting_openings(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], length: int
) -> list[Opening]:
    """The prompts in the chat template, without those after which an answer of `length` tokens no
    longer fits into the model's context.
    """
    openings = chat_openings(prompts, tokenizer)
    room = context_length(model) - length
    fitting = [opening for opening in openings if len(opening.ids) <= room]
    if len(fitting) < len(openings):
        logger.info(
            "%d of %d prompts are longer than the %d tokens that the model's context leaves them",
            len(openings) - len(fitting),
            len(openings),
            room,
        )
    if not fitting:
        raise OptionError(
            f"no prompt fits into {room} tokens, which is what the model's context leaves beside "
            "an answer; give --general self, or a text file"
        )
    return fitting


def cached_answers(
    model: nn.Module,
    tokenizer: Any,
    openings: Sequence[Opening],
    length: int,
    what: str,
    *,
    sampling: bool = True,
) -> list[Answer]:
    """The answers to all openings; the first process samples those that the cache lacks.

    Raises OptionError where it lacks some and nothing is to be sampled.
    """
    path = _answers_file(model, tokenizer, length)
    if distributed.first():
        with in_turn(path):
            if sampling:
                _complete(path, model, tokenizer, openings, length, what)
    distributed.barrier()
    answers = _by_opening(_kept_lines(path, model, length))
    missing = sum((opening.id, opening.ids) not in answers for opening in openings)
    if missing:
        raise OptionError(
            f"{missing} of {len(openings)} answers of this base are not in the cache "
            f"('{path.parent}'), and nothing is to be sampled; sample them once without --fast, "
            "or give --own-answers FILE"
        )
    return [answers[opening.id, opening.ids] for opening in openings]


def _answers_file(model: nn.Module, tokenizer: Any, length: int) -> Path:
    """Where the answers of a model lie, whatever they answer."""
    made_of = [
        exact_fingerprint(model),
        sorted(stop_tokens(model, tokenizer)),
        length,
        ANSWERS_SEED,
    ]
    return cached_file("answers", made_of, ".jsonl")


def _kept_lines(path: Path, model: nn.Module, length: int) -> list[Answer]:
    """The answers in the cache that this model can have given: of its tokens, and no longer."""
    words = next(model.get_input_embeddings().parameters()).shape[0]  # type: ignore[operator]
    return [
        answer
        for answer in read_lines(path)
        if max(answer.ids) < words and len(answer.scored) <= length
    ]


def sampling_seconds(
    model: nn.Module, tokenizer: Any, openings: Sequence[Opening], length: int
) -> float:
    """About how long it takes to sample the answers that the cache lacks; 0 where it has all.

    Costs a few forward passes.
    """
    path = _answers_file(model, tokenizer, length)
    there = _by_opening(_kept_lines(path, model, length))
    missing = sum((opening.id, opening.ids) not in there for opening in openings)
    return seconds_to_sample(model, missing, length) if missing else 0.0


def _by_opening(answers: Sequence[Answer]) -> dict[tuple[str, tuple[int, ...]], Answer]:
    """The answers by what they answer: another template writes the same prompt differently."""
    return {(answer.prompt, answer.ids[: answer.start]): answer for answer in answers}


def _complete(
    path: Path,
    model: nn.Module,
    tokenizer: Any,
    openings: Sequence[Opening],
    length: int,
    what: str,
) -> None:
    """Sample what the file lacks, and add it batch by batch."""
    known = _kept_lines(path, model, length)
    there = _by_opening(known)
    missing = [opening for opening in openings if (opening.id, opening.ids) not in there]
    if not missing:
        return
    logger.info(
        "sampling %d answers of at most %d tokens from the model (%s)%s%s",
        len(missing),
        length,
        what,
        f"; {len(openings) - len(missing)} are there" if len(missing) < len(openings) else "",
        _how_long(model, len(missing), length),
    )
    # A line that an interruption cut off would spoil the one that follows it.
    path.write_text(write_lines(known), encoding="utf-8")
    bar = progress("sampling", len(missing), unit="answer")
    with bar as moved, path.open("a", encoding="utf-8") as file:

        def keep(answers: list[Answer]) -> None:
            file.write(write_lines(answers))
            file.flush()
            moved.advance(len(answers))

        sample(model, tokenizer, missing, seed=ANSWERS_SEED, length=length, done=keep)


def _how_long(model: nn.Module, count: int, length: int) -> str:
    """What the announcement says of the time; nothing where nobody would wait for it."""
    if count * length < WORTH_TIMING:
        return ""
    return f"; this takes about {duration(seconds_to_sample(model, count, length))}, once"


def _check_said(answers: Sequence[Answer], wanted: OwnText, length: int) -> None:
    """Refuse answers on which nothing can be measured, and say where most are cut."""
    tokens = sum(len(answer.scored) for answer in answers)
    if tokens < FEWEST_TOKENS * len(answers):
        raise OptionError(
            f"the model says next to nothing: {tokens} tokens in {len(answers)} answers "
            f"({wanted.kind}); expected a model that answers. Check its chat template, or give "
            "--general TEXT"
        )
    cut = sum(not answer.ended for answer in answers)
    if wanted.kind == CHAT and cut > len(answers) / 2:
        _say_once(
            logging.WARNING,
            f"more than half of the answers are cut at {length} tokens before they end, so that "
            "how they end is hardly held or measured; give a larger --answer-length",
        )


@functools.cache
def _say_once(level: int, text: str) -> None:
    """Say of all parts together what holds for each of them."""
    logger.log(level, text)
