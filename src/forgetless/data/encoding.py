"""TODO data.encoding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.data.documents import Document
from forgetless.errors import FileError, OptionError

Encoded = tuple[
    list[int], list[bool]
]  # token ids, and whether each is scored as a prediction target
TOO_SHORT = "the text is too short: no document has two tokens; give more general text"


def encode(
    documents: Sequence[Document], tokenizer: Any, *, length: int | None = None
) -> list[Encoded]:
    """Token ids and scored mask of each document, cut into pieces of at most `length` tokens;
    pieces of one token are dropped (nothing to predict).
    """
    pieces: list[Encoded] = []
    for document in documents:
        ids, scored = encode_document(document, tokenizer)
        step = length or max(len(ids), 1)
        pieces += [
            (ids[i : i + step], scored[i : i + step])
            for i in range(0, len(ids), step)
            if len(ids[i : i + step]) > 1
        ]
    if not pieces:
        raise FileError(TOO_SHORT)
    return pieces


def encode_whole(
    documents: Sequence[Document], tokenizer: Any
) -> tuple[list[Encoded], list[Document]]:
    """As `encode` without a length, with the document that each piece is."""
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
    if document.messages is not None:
        return encode_chat(document.messages, tokenizer)
    ids = list(tokenizer(document.text or "", verbose=False)["input_ids"])
    return ids, [True] * len(ids)


def encode_prompted(prompt: str, completion: str, tokenizer: Any) -> Encoded:
    """Token ids of prompt and completion together; scored from where they differ from the prompt
    alone, since tokens may merge across the boundary.
    """
    head = list(tokenizer(prompt, verbose=False)["input_ids"])
    whole = list(tokenizer(prompt + completion, verbose=False)["input_ids"])
    start = _common_prefix(head, whole)
    return whole, [i >= start for i in range(len(whole))]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def encode_chat(
    messages: list[dict[str, str]], tokenizer: Any, *, assistant_only: bool = True
) -> Encoded:
    """A chat through the tokenizer's template, assistant turns scored (or all of it).

    The turns are known from the template's {% generation %} markers; for a template without them,
    from the training template that TRL has for many model families, else by templating ever longer
    prefixes. Raises ValueError without a template, and where a longer chat rewrites what came
    before.
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
    made = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(made["input_ids"]), [bool(one) for one in made["assistant_masks"]]


def _marked_template(tokenizer: Any) -> str | None:
    """A chat template with {% generation %} markers: the tokenizer's own, or TRL's for its family;
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
    """An assistant turn is what the chat up to it has more than the prompt for it; costs two
    templatings per turn.
    """
    ids = templated(tokenizer, messages)
    scored = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = templated(tokenizer, messages[:index], prompt=True) if index else []
            whole = templated(tokenizer, messages[: index + 1])
            start, end = _common_prefix(prompt, whole), len(whole)
            if ids[:end] != whole:
                raise FileError(
                    f"the chat template writes turn {index + 1} differently once the chat goes "
                    "on, so its tokens cannot be told apart; "
                    "add {% generation %} markers to the template, or keep one assistant turn "
                    "per row"
                )
            scored[start:end] = [True] * (end - start)
    return ids, scored


def templated(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    """Token ids of a chat by the tokenizer's template; `prompt`: up to where the assistant would
    answer.
    """
    return list(
        tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
    )


def batches(
    encoded: Sequence[Encoded], *, batch_size: int, pad_id: int, shuffle_seed: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches of input_ids, attention_mask and labels (batch, longest); labels are -100 on padding
    and where nothing is scored.
    """
    order = list(range(len(encoded)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        yield collate([encoded[i] for i in order[start : start + batch_size]], pad_id)


def collate(pieces: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """One right-padded batch."""
    width = max(len(ids) for ids, _ in pieces)
    ids = torch.full((len(pieces), width), pad_id)
    mask = torch.zeros(len(pieces), width, dtype=torch.long)
    labels = torch.full((len(pieces), width), -100)
    for row, (tokens, scored) in enumerate(pieces):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.tensor(
            [t if s else -100 for t, s in zip(tokens, scored, strict=True)]
        )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sample_documents(
    model: nn.Module, tokenizer: Any, count: int, length: int, seed: int, *, batch_size: int = 16
) -> list[Document]:
    """`count` documents of at most `length` tokens sampled from the model at temperature 1, for
    --general self.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise OptionError(
            "--general self needs a tokenizer with a begin- or end-of-text token; give a text "
            "file instead"
        )
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    texts: list[str] = []
    for _ in range(4 * (count // batch_size + 1)):
        prompt = torch.full((batch_size, 1), start, device=device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length - 1,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += [
            text for text in tokenizer.batch_decode(out, skip_special_tokens=True) if text.strip()
        ]
        if len(texts) >= count:
            break
    return [Document(text, None, "self") for text in texts[:count]]
