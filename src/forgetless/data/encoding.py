"""Text as a model reads it: token ids, which of them are scored, and padded batches of both.

    encoded = encode_documents(documents, tokenizer, length=128)
    encoded[0]                                              # ([5, 9, 2], [True, True, True])
    for batch in batches(encoded, batch_size=4, pad_id=0):  # input_ids, attention_mask, labels
        loss = model(**batch).loss

Every token of plain text is scored. Of a prompt with its completion the completion is, of a chat
what the assistant says. The first token of a sequence is never predicted, whatever its mask says.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from forgetless.data.documents import Document, TokenDocument
from forgetless.errors import FileError

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
        return encode_chat(document.messages, tokenizer)
    ids = list(tokenizer(document.text or "", verbose=False)["input_ids"])
    return ids, [True] * len(ids)


def encode_prompted(prompt: str, completion: str, tokenizer: Any) -> Encoded:
    """Token ids of prompt and completion together, scored from where they differ from the prompt
    alone: tokens may merge across the boundary.
    """
    head = list(tokenizer(prompt, verbose=False)["input_ids"])
    ids = list(tokenizer(prompt + completion, verbose=False)["input_ids"])
    start = _common_prefix(head, ids)
    return ids, [i >= start for i in range(len(ids))]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def encode_chat(
    messages: list[dict[str, str]], tokenizer: Any, *, assistant_only: bool = True
) -> Encoded:
    """A chat through the tokenizer's template; assistant turns are scored, or all of it.

    The turns are known from the template's {% generation %} markers. Where it has none, they are
    known from the training template that TRL has for many model families, else by templating ever
    longer prefixes of the chat. Raises ValueError without a template, and where a longer chat
    rewrites what came before.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FileError(
            "the data holds chat messages, but the tokenizer has no chat template; give plain "
            "text, or use an instruct model"
        )
    if not assistant_only:
        ids = templated(tokenizer, messages)
        return ids, [True] * len(ids)
    template = _marked_template(tokenizer)
    if template is None:
        return _chat_by_prefixes(messages, tokenizer)
    output = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(output["input_ids"]), [bool(bit) for bit in output["assistant_masks"]]


def _marked_template(tokenizer: Any) -> str | None:
    """A chat template with {% generation %} markers: the tokenizer's own, or TRL's for its family.

    None where there is none.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.get_chat_template())
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # a template that TRL does not know
        return None


def _chat_by_prefixes(messages: list[dict[str, str]], tokenizer: Any) -> Encoded:
    """An assistant turn is what the chat up to it has more than the prompt for it.

    Costs two templatings per turn.
    """
    ids = templated(tokenizer, messages)
    scored = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = templated(tokenizer, messages[:index], prompt=True) if index else []
        so_far = templated(tokenizer, messages[: index + 1])
        start = _common_prefix(prompt, so_far)
        end = len(so_far)
        if ids[:end] != so_far:
            raise FileError(
                f"the chat template writes turn {index + 1} differently once the chat goes "
                "on, so its tokens cannot be told apart; add {% generation %} markers to the "
                "template, or keep one assistant turn per row"
            )
        scored[start:end] = [True] * (end - start)
    return ids, scored


def templated(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    """Token ids of a chat by the tokenizer's template.

    With `prompt` they end where the assistant would begin to answer.
    """
    return list(
        tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
    )


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
