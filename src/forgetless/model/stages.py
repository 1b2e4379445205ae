"""What came before a step of a sequence of domains.

These are the adapters that the model stands on, and the domains that must not be lost again. A step
trains on the base model with every earlier update merged into its weights, in memory: nothing but
adapters lies on the disk. On the way there the model passes each state that something is measured
against: the one that the command started from (general text), and the one right after each domain
was learned.

    learned = LearnedDomain("sciq", "sciq=held.jsonl")
    earlier = Earlier((Stage("steps/1/final", (learned,)),), reference=0, budget_fraction=1.0)
    for number, model in walk(model, earlier): ...     # 0: the bare base, 1: after sciq

Costs one merge for each stage. In half precision each merge rounds the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.model.adapter_files import CONFIG, with_adapter
from forgetless.model.merging import merged_adapter


@dataclass(frozen=True)
class LearnedDomain:
    """A domain that was learned, with held-out rows to measure it by."""

    name: str
    data: str
    split: str | None = None  # of a Hub dataset; None: the held-out one


@dataclass(frozen=True)
class Stage:
    """An adapter to merge, and the domains that its training has learned."""

    adapter: str  # relative to the model before it
    domains: tuple[LearnedDomain, ...] = ()


@dataclass(frozen=True)
class Earlier:
    """The stages below a step.

    Attributes:
        stages: the first one first.
        reference: how many of them are merged where the general text is measured.
        budget_fraction: how much of the budget may be spent by the end of this step, 1 for all.
    """

    stages: tuple[Stage, ...] = ()
    reference: int = 0
    budget_fraction: float = 1.0


def walk(model: nn.Module, earlier: Earlier) -> Iterator[tuple[int, nn.Module]]:
    """(stages merged so far, the model then), from the bare `model` on; it is changed in place."""
    yield 0, model
    for number, stage in enumerate(earlier.stages, 1):
        model = merged(model, stage.adapter)
        yield number, model


def merged(model: nn.Module, adapter: str) -> nn.Module:
    """`model` with a PEFT adapter's update in its weights, in place.

    No trace of the adapter is left. Where `adapter` is the folder of a fully fine-tuned model, its
    weights take the place of those of `model`.
    """
    folder = Path(adapter)
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return _replaced(model, adapter)
    plain = merged_adapter(with_adapter(model, adapter))
    return plain.requires_grad_(True)  # as it was loaded


def _replaced(model: nn.Module, folder: str) -> nn.Module:
    """`model` with the weights of the one in `folder`."""
    kind: Any = type(model)
    trained = kind.from_pretrained(folder, dtype=next(model.parameters()).dtype)
    model.load_state_dict(trained.state_dict())
    return model
