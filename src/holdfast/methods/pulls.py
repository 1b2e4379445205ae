"""Methods that pull the weights back where importance says so, right before each optimizer step: `holdfast`."""

from __future__ import annotations

from torch import nn

from holdfast.methods.method import Setup
from holdfast.penalty.pull import Penalty


def from_file(setup: Setup, model: nn.Module) -> Penalty | None:
    """The penalty of --importance; None where its strength is 0."""
    o = setup.options
    assert setup.importance is not None and o.strength is not None
    if o.strength == 0:
        return None
    return Penalty(model, setup.importance, strength=o.strength, layers=setup.layers, anchor=o.anchor, names=o.targets if o.full else None,
                   offload=o.offload_importance)  # fmt: skip
