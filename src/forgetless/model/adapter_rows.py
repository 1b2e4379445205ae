"""Embeddings with more rows than the base has: tokens that were added for a training.

    give_rows(model, adapter_shapes(folder))   # the base gets as many rows as the adapter's tables

An adapter that trains whole embeddings (`modules_to_save`) of a base that was resized brings tables
that PEFT cannot put on the base as it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from forgetless.errors import FileError

logger = logging.getLogger("forgetless")


def give_rows(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Resize the embeddings of a bare base to the rows of an adapter's, where it has such.

    `shapes`: name -> shape of the adapter's tensors, as they are called in its file. New rows are
    the mean of all others, the same at every call. Raises FileError where the adapter's tables have
    fewer rows than the base, or differ.
    """
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(table, "weight", None)
    if weight is None or weight.ndim != 2 or hasattr(model, "peft_config"):
        return
    has, width = weight.shape
    ends = _names_of_ends(model)
    found = {
        shape[0]
        for name, shape in shapes.items()
        if any(name.endswith(end) for end in ends) and len(shape) == 2 and shape[1] == width
    }
    if not found - {has}:
        return
    rows = max(found)
    if len(found) > 1 or rows < has:
        raise FileError(
            f"the adapter has embeddings of {sorted(found)} rows, and the base has {has}; give the "
            "base that it was trained on"
        )
    _resize(model, rows)
    logger.info("the adapter has embeddings of %d tokens; the base's %d get more rows", rows, has)


def _names_of_ends(model: Any) -> list[str]:
    """How the names of the embeddings' tensors end in an adapter's file: '.embed_tokens.weight'."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = {id(module): path for path, module in model.named_modules()}
    return [f".{paths[id(end)]}.weight" for end in ends if end is not None]


@torch.no_grad()
def _resize(model: Any, rows: int) -> None:
    """`rows` rows for input and output embeddings, the new ones the mean of the others."""
    had = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            weight: nn.Parameter = end.weight
            weight[had:] = weight[:had].float().mean(0).to(weight.dtype)
