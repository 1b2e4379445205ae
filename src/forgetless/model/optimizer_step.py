"""Hooks around the step of any torch optimizer, which the recorder and the penalty share.

A step pre-hook fires before a closure has run, so work that needs gradients is put inside the
closure where there is one.

    handle = before_step(unwrapped_optimizer(optimizer), action)
    ...
    handle.remove()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# A parameter group of an optimizer, as torch has it: "params", "lr" and what else it was given.
ParameterGroup = dict[str, Any]


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper, which offers no step hooks of its own.

    Raises ValueError for anything else.
    """
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(
        getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(
                f"expected a torch optimizer, found {type(optimizer).__name__}; forgetless needs "
                "its step hooks"
            )
        optimizer = optimizer.optimizer
    return optimizer


def before_step(
    optimizer: torch.optim.Optimizer,
    action: Callable[[], None],
    *,
    first: bool = False,
    closure_once: bool = False,
) -> Any:
    """Run `action` when the gradients of a step are there and nothing has moved.

    Returns the handle to remove. `first` puts the action before all other pre-hooks. `closure_once`
    raises ValueError when the optimizer calls its closure twice in one step, as LBFGS does.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # args[0] is the optimizer.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            action()
            return None
        calls = 0

        def wrapped() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1 and closure_once:
                raise ValueError(
                    "the optimizer calls its closure several times per step (as LBFGS does); its "
                    "movements have no single gradient: use another"
                )
            result = closure()
            action()
            return result

        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    handle = optimizer.register_step_pre_hook(hook)
    if first:
        hooks: Any = optimizer._optimizer_step_pre_hooks  # an OrderedDict, which its type hides
        hooks.move_to_end(handle.id, last=False)
    return handle


def pending_scale(optimizer: torch.optim.Optimizer) -> float:
    """The GradScaler's factor that `.grad` still carries when the hooks run, else 1.

    Fused optimizers unscale inside their step.
    """
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def will_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer is about to skip this step.

    It does where the GradScaler found an infinity.
    """
    infinities = getattr(optimizer, "found_inf", None)
    return infinities is not None and float(infinities) > 0
