"""Whether the documents that are packed into one row stay apart in a model.

    check_packing(model)      # ValueError where a document reads the one before it

A packed row has no mask: the positions, which begin again at 0 with each document, say where one
ends, and a model that makes its mask of them keeps documents apart. OPT and BLOOM do not, nor do
models with a recurrent state; each document is then trained as the continuation of another. Names
don't tell which model does what, so one small forward pass does: another first document must not
change what is predicted in the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Tokens of each of the two documents.
DOCUMENT_TOKENS = 6
# The change of logits in the second document, as a fraction of the largest of them, from which on
# it reads the first. Of tiny random models it was 0 exactly where documents are apart (Llama,
# Qwen 3, Gemma 2, GPT-2, GPT-NeoX), and .09 (OPT), .003 (BLOOM) and .14 (Mamba) where they are not.
READS_FROM = 1e-4


def check_packing(model: nn.Module) -> None:
    """Raise ValueError where packed documents read each other in `model`, or where it cannot be
    given a packed row at all.
    """
    try:
        moved = moved_by_the_first(model)
    except TypeError as error:
        raise ValueError(
            f"packing gives a model the positions of its documents, which this one does not take "
            f"({error}); leave packing out"
        ) from error
    if moved > READS_FROM:
        raise ValueError(
            "packed documents read each other in this model: another first document changed what "
            f"is predicted in the second by {moved:.2g} of the largest logit, expected 0; leave "
            "packing out"
        )


@torch.no_grad()
def moved_by_the_first(model: nn.Module) -> float:
    """How much another first document changes the logits of the second, as a fraction of the
    largest of them.
    """
    device = next(model.parameters()).device
    base: Any = model
    words = base.get_input_embeddings().num_embeddings
    training = model.training
    model.eval()
    try:
        first, other, second = (
            torch.arange(start, start + DOCUMENT_TOKENS, device=device) % words
            for start in (3, 17, 31)
        )
        one, two = (_second_logits(model, before, second) for before in (first, other))
    finally:
        model.train(training)
    return float((one - two).abs().max() / one.abs().max().clamp_min(1e-9))


def _second_logits(model: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of the second of two packed documents, as TRL gives them."""
    size = len(first)
    ends = torch.tensor([0, size, size + len(second)], dtype=torch.int32, device=first.device)
    positions = torch.arange(size, device=first.device)
    packed: dict[str, Any] = {
        "input_ids": torch.cat([first, second])[None],
        "position_ids": torch.cat([positions, positions[: len(second)]])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": size,
        "max_length_k": size,
        "seq_idx": torch.tensor([0] * size + [1] * len(second), device=first.device)[None].int(),
        "use_cache": False,
    }
    logits: Tensor = model(**packed).logits
    return logits[0, size:].float()
