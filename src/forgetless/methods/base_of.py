"""The base of a model in training, for as long as its logits are asked for.

    base = BaseOf(model)             # before training
    with torch.no_grad(), base:
        logits = model(**batch).logits

An adapter is switched off. Where the weights themselves are trained, a copy of them is kept, and
put in their place.
"""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from forgetless.model.adapters import bare, has_adapter


class BaseOf:
    """A context in which `model` is what it was when this was made."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        if not has_adapter(model):
            trained = [p for p in model.parameters() if p.requires_grad]
            self._copies = [(p, p.detach().clone()) for p in trained]
        self._open = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._open.enter_context(bare(self.model))
        for p, copy in self._copies:
            self._open.callback(setattr, p, "data", p.data)
            p.data = copy

    def __exit__(self, *_: object) -> None:
        self._open.close()
