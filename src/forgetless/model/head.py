"""The logits of chosen places, for which alone the head of a language model is asked.

    logits = logits_at(model, scored, input_ids=ids, attention_mask=mask)   # (places, vocabulary)

The head is a fifth of a small model's work at each token, and its logits are most of the memory.
Where prompts are not scored and rows are padded, most places need none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def logits_at(model: nn.Module, places: Tensor, **inputs: Any) -> Tensor:
    """The model's logits (chosen, vocabulary) at `places`, booleans (batch, length), row by row.

    `inputs` are what the model takes. A model whose head is not known, or is not given one hidden
    state for each token, makes the logits of all places.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()

    def only_chosen(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden, *others = given
        if hidden.shape[:-1] != places.shape:
            return None
        return (hidden[places.to(hidden.device)], *others)

    handle = None if head is None else head.register_forward_pre_hook(only_chosen)
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if logits.ndim == 2 else logits[places.to(logits.device)]
