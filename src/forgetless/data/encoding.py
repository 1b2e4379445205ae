"""Text as a model reads it: token ids, which of them are scored, and padded batches of both.

    encoded = encode_documents(documents, tokenizer, length=128)
    encoded[0]                                              # ([5, 9, 2], [True, True, True])
    for batch in batches(encoded, batch_size=4, pad_id=0):  # input_ids, attention_mask, labels
        loss = model(**batch).loss

Every token of plain text is scored. Of a prompt with its completion the completion is, of a chat
what the assistant says. The first token of a sequence is never predicted, whatever its mask says.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forgetless.data.chats import (
    Chat,
    dropped_thoughts,
    fitted,
    marked,
    templated,
    thought_of,
    tools_are_shown,
)
from forgetless.data.documents import Document, TokenDocument
from forgetless.data.turns import Turn, turn_text
from forgetless.errors import FileError

logger = logging.getLogger("forgetless")
# Token ids, and whether each of them is scored as a prediction target.
Encoded = tuple[list[int], list[bool]]
# What is said of text in which nothing can be predicted.
TOO_SHORT = "the text is too short: no document has two tokens; give more general text"


def encode_documents(
    documents: Sequence[Document], tokenizer: Any, *, length: int | None = None
) -> list[Encoded]:
    """Token ids and scored mask of each document, cut into pieces of at most `length` tokens.

    A piece of one token is dropped, since there is nothing to predict in it. Raises ValueError
    where no piece is left.
    """
    return [piece for piece, _ in encode_pieces(documents, tokenizer, length=length)]


def encode_pieces(
    documents: Sequence[Document], tokenizer: Any, *, length: int | None = None
) -> list[tuple[Encoded, Document]]:
    """The pieces of `encode_documents`, each with the document that it is of."""
    pieces: list[tuple[Encoded, Document]] = []
    for document in documents:
        ids, scored = encode_document(document, tokenizer)
        step = length or max(len(ids), 1)
        pieces += [
            ((ids[i : i + step], scored[i : i + step]), document)
            for i in range(0, len(ids), step)
            if len(ids[i : i + step]) > 1
        ]
    if not pieces:
        raise FileError(TOO_SHORT)
    return pieces


def encode_whole(
    documents: Sequence[Document], tokenizer: Any
) -> tuple[list[Encoded], list[Document]]:
    """Each document in one piece, and the documents that the pieces are.

    A document of one token is dropped. Raises ValueError where none is left.
    """
    encoded, whose = [], []
    for document in documents:
        ids, scored = encode_document(document, tokenizer)
        if len(ids) > 1:
            encoded.append((ids, scored))
            whose.append(document)
    if not encoded:
        raise FileError(TOO_SHORT)
    return encoded, whose


def encode_document(document: Document, tokenizer: Any) -> Encoded:
    """All token ids of a document, scored in plain text; in a chat the assistant's turns are."""
    if isinstance(document, TokenDocument):
        return list(document.ids), [at >= document.start for at in range(len(document.ids))]
    if document.messages is not None:
        chat = Chat(
            document.messages,
            getattr(document, "tools", None),
            getattr(document, "chat_template_kwargs", {}),
            f"'{document.source}', the chat that begins {turn_text(document.messages[0])[:60]!r}",
        )
        return encode_chat(chat, tokenizer)
    ids = text_ids(document.text or "", tokenizer)
    return ids, [True] * len(ids)


def text_ids(text: str, tokenizer: Any, *, added_end: bool = True) -> list[int]:
    """Token ids of plain text.

    A text that begins with the begin-of-text token, or ends with the end-of-text token, has it once
    where the tokenizer adds it too. Without `added_end` an end that the tokenizer adds by itself is
    left out.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = begin is not None and ids[:2] == [begin, begin]
    ends = end is not None and ids[-1:] == [end]
    if not begins and not ends:
        return ids
    written = list(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
    if begins and written[:2] != [begin, begin]:
        ids = ids[1:]
    if ends and written[-1:] != [end]:
        return ids if added_end else ids[:-1]
    twice = ends and ids[-2:] == [end, end] and written[-2:] != [end, end]
    return ids[:-1] if twice else ids


def encode_prompted(prompt: str, completion: str, tokenizer: Any) -> Encoded:
    """Token ids of prompt and completion together, scored from where they differ from the prompt
    alone: tokens may merge across the boundary.
    """
    head = text_ids(prompt, tokenizer, added_end=False)
    ids = text_ids(prompt + completion, tokenizer, added_end=False)
    start = _common_prefix(head, ids)
    return ids, [i >= start for i in range(len(ids))]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def encode_chat(
    chat: Chat | list[Turn],
    tokenizer: Any,
    *,
    assistant_only: bool = True,
    prompt_turns: int | None = None,
) -> Encoded:
    """A chat through the tokenizer's template; assistant turns are scored, or all of it.

    The turns are known from the template's {% generation %} markers. Where it has none, they are
    known from the training template that TRL has for many model families, else by templating ever
    longer prefixes of the chat. With `prompt_turns` what follows so many turns is scored, as TRL
    does with a prompt and a completion that are chats.

    Raises ValueError with the chat's row: without a template, where it refuses the chat or leaves
    out a turn, and where a longer chat rewrites what came before.
    """
    if not isinstance(chat, Chat):
        chat = Chat(chat)
    if not getattr(tokenizer, "chat_template", None):
        raise FileError(
            "the data holds chat messages, but the tokenizer has no chat template; give plain "
            "text, or use an instruct model"
        )
    by_markers = assistant_only and prompt_turns is None
    template = _marked_template(tokenizer, chat) if by_markers else None
    chat = fitted(chat, tokenizer, template)
    if template is not None:
        return marked(tokenizer, chat, template)
    if by_markers:
        return _chat_by_prefixes(chat, tokenizer)
    ids = templated(tokenizer, chat)
    if prompt_turns is None or not assistant_only:
        return ids, [True] * len(ids)
    start = _common_prefix(templated(tokenizer, chat.upto(prompt_turns), prompt=True), ids)
    return ids, [place >= start for place in range(len(ids))]


def say_left_out(chats: Sequence[Chat], tokenizer: Any) -> None:
    """Say where the template leaves out tools, or what the assistant thought before it spoke."""
    for chat in [chat for chat in chats if chat.tools][:1]:
        if not tools_are_shown(fitted(chat, tokenizer), tokenizer):
            logger.warning("the chat template shows the model no tools, which the rows have")
    thoughts = 0
    for chat in chats:
        if any(thought_of(turn) for turn in chat.messages):
            template = _marked_template(tokenizer, chat)
            written = fitted(chat, tokenizer, template)
            thoughts += dropped_thoughts(written, tokenizer, template)
    if thoughts:
        logger.warning(
            "the chat template leaves out what the assistant thought in %d turns, as many do with "
            "all turns but the last; the rest of these turns is learned",
            thoughts,
        )


def _marked_template(tokenizer: Any, chat: Chat) -> str | None:
    """A chat template with {% generation %} markers: the tokenizer's own, or TRL's for its family.

    None where there is none.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.get_chat_template(tools=chat.tools))
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # a template that TRL does not know
        return None


def _chat_by_prefixes(chat: Chat, tokenizer: Any) -> Encoded:
    """An assistant turn is what the chat up to it has more than the prompt for it.

    Costs two templatings per turn.
    """
    ids = templated(tokenizer, chat)
    scored = [False] * len(ids)
    for index, turn in enumerate(chat.messages):
        if turn["role"] != "assistant":
            continue
        so_far = templated(tokenizer, chat.upto(index + 1))
        start = _start_of_turn(chat, index, so_far, tokenizer)
        end = len(so_far)
        if ids[:end] != so_far:
            raise FileError(
                f"{chat.where}: the chat template writes turn {index + 1} differently once the "
                "chat goes on, so its tokens cannot be told apart; add {% generation %} markers "
                "to the template, or keep one assistant turn per row"
            )
        scored[start:end] = [True] * (end - start)
    return ids, scored


def _start_of_turn(chat: Chat, index: int, so_far: list[int], tokenizer: Any) -> int:
    """Where the tokens of an assistant turn begin in those of the chat up to it.

    A chat that begins with the assistant has no prompt, and templates write none for a system turn
    alone, or refuse. Then the turn begins behind the words that open an answer elsewhere, or
    where it differs from another turn in its place.
    """
    before = chat.upto(index)
    if any(turn["role"] != "system" for turn in before.messages):
        return _common_prefix(templated(tokenizer, before, prompt=True), so_far)
    asked = Chat([{"role": "user", "content": "a"}], where=chat.where)
    opened = templated(tokenizer, asked, prompt=True)
    opening = opened[_common_prefix(templated(tokenizer, asked), opened) :]
    for start in range(len(so_far), len(opening) - 1, -1):
        if opening and so_far[start - len(opening) : start] == opening:
            return start
    other = {"role": "assistant", "content": "..."}
    instead = replace(before, messages=[*before.messages, other])
    return _common_prefix(templated(tokenizer, instead), so_far)


def batches(
    encoded: Sequence[Encoded], *, batch_size: int, pad_id: int, shuffle_seed: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches of input_ids, attention_mask and labels, each (batch, longest).

    Labels are -100 on padding and where nothing is scored.
    """
    order = list(range(len(encoded)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        yield collate([encoded[i] for i in order[start : start + batch_size]], pad_id)


def collate(pieces: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """One batch as `batches` yields it, padded on the right."""
    width = max(len(ids) for ids, _ in pieces)
    ids = torch.full((len(pieces), width), pad_id)
    mask = torch.zeros(len(pieces), width, dtype=torch.long)
    labels = torch.full((len(pieces), width), -100)
    for row, (tokens, scored) in enumerate(pieces):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets = [token if counts else -100 for token, counts in zip(tokens, scored, strict=True)]
        labels[row, : len(tokens)] = torch.tensor(targets)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
