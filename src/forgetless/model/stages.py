"""What came before a step of a sequence of domains: the adapters that the model stands on, and the
domains that must not be lost again.

A step trains on the base model with every earlier update merged into its weights, in memory:
nothing but adapters lies on the disk. On the way there the model passes each state that something
is measured against: the one that the command started from (general text), and the one right after
each domain was learned.

    earlier = Earlier((Stage("steps/1/final", (Held("sciq", "sciq=held.jsonl"),)),), reference=0,
    share=1.0)
    for number, model in walk(model, earlier): ...     # 0: the bare base, 1: after sciq

Costs one merge for each stage. In half precision each merge rounds the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.model.adapter_files import with_adapter


@dataclass(frozen=True)
class Held:
    """A domain that was learned: its name, and held-out rows (`split` of a Hub dataset; None: the
    held-out one).
    """

    name: str
    data: str
    split: str | None = None


@dataclass(frozen=True)
class Stage:
    """An adapter to merge, relative to the model before it, and the domains that its training has
    learned.
    """

    adapter: str
    held: tuple[Held, ...] = ()


@dataclass(frozen=True)
class Earlier:
    """The stages below a step.

    `reference`: how many of them are merged where the general text is measured; `share`: how much
    of the budget is to be spent by the end of this step.
    """

    stages: tuple[Stage, ...] = ()
    reference: int = 0
    share: float = 1.0


def walk(model: nn.Module, earlier: Earlier) -> Iterator[tuple[int, nn.Module]]:
    """(stages merged so far, the model then), from the bare `model` on; it is changed in place."""
    yield 0, model
    for number, stage in enumerate(earlier.stages, 1):
        model = merged(model, stage.adapter)
        yield number, model


def merged(model: nn.Module, adapter: str) -> nn.Module:
    """`model` with a PEFT adapter's update in its weights, in place, and no trace of the adapter
    left.
    """
    whole: Any = with_adapter(model, adapter).merge_and_unload()
    if hasattr(whole, "peft_config"):
        del whole.peft_config  # else the next adapter is taken for a second one
    whole.requires_grad_(True)  # as it was loaded
    found: nn.Module = whole.eval()
    return found
