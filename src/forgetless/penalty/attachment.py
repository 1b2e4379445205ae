"""A penalty's hook on an optimizer: the pull comes right before every step.

with penalty.attach(optimizer):
    ...any training loop...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from forgetless.model.optimizer_step import (
    before_step,
    pending_scale,
    unwrapped_optimizer,
    will_skip,
)
from forgetless.model.weights import TargetWeight


class Pulling(Protocol):
    """What an attachment needs of a penalty."""

    @property
    def weights(self) -> Sequence[TargetWeight]: ...

    def pull(self, *, scale: float = 1.0) -> None: ...


Pulls = TypeVar("Pulls", bound=Pulling)


class PenaltyAttachment(Generic[Pulls]):
    """The hook of one penalty on one optimizer; `close()` or leaving the `with` block removes it.

    Raises ValueError where nothing can be held, or where another optimizer steps the weights.
    """

    def __init__(self, penalty: Pulls, optimizer: Any):
        self.penalty = penalty
        self.optimizer = unwrapped_optimizer(optimizer)
        _check_steps(self.optimizer, penalty.weights)
        self._handle: Any = before_step(self.optimizer, self._pull)

    def __enter__(self) -> Pulls:
        return self.penalty

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _pull(self) -> None:
        """Pull, unless a GradScaler is about to skip the step.

        The pull is scaled where a fused optimizer has yet to unscale the gradients.
        """
        if not will_skip(self.optimizer):
            self.penalty.pull(scale=pending_scale(self.optimizer))


def _check_steps(optimizer: Any, weights: Sequence[TargetWeight]) -> None:
    """Raise ValueError unless the optimizer steps every parameter that is trained."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad for weight in weights for p in weight.parameters):
        raise ValueError(
            "every target weight is frozen, so there is nothing to hold; unfreeze the "
            "adapter (for PEFT: is_trainable=True)"
        )
    for weight in weights:
        if any(p.requires_grad and id(p) not in known for p in weight.parameters):
            raise ValueError(
                f"'{weight.name}' is not among this optimizer's parameters; attach the "
                "penalty to the optimizer that trains it, or, where that one steps copies, call "
                "penalty.pull() before the gradients are copied"
            )
