"""A trainer that learns the domain's rows by an objective (objectives.py) in place of their
cross-entropy.

    learn_by(trainer, Objective(eaft_rows))      # before trainer.train()

TRL's own loss builds no logits. Here the head is asked at the scored tokens, whose logits are made:
(scored tokens of a micro-batch, vocabulary) twice, once more where the base is asked. Evaluation
stays the cross-entropy. What is logged as `loss` is the objective; `cross_entropy` stands beside
it, and `token_weight`, how much the cross-entropy of a token counted on average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from forgetless.methods.base_of import BaseOf
from forgetless.methods.objectives import Objective, Summed, summed
from forgetless.model import engine
from forgetless.model.head import logits_at
from forgetless.penalty.callback import LoggingCallback

# Inputs of a trainer's batch that a forward pass for logits does not get.
NOT_FOR_LOGITS = ("labels", "use_cache")


class LearnsBy(LoggingCallback):
    """The loss of a trainer by an objective, and what it was since the last log."""

    def __init__(self, trainer: Any, objective: Objective, usual: Callable[..., Any]):
        self.trainer = trainer
        self.objective = objective
        self.usual = usual
        self._base = BaseOf(trainer.model) if objective.from_base else None
        self._cross_entropy = 0.0
        self._weight = 0.0
        self._scored = 0
        self._tokens = 0

    def loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """In place of the trainer's `compute_loss`: a mean over the scored tokens of a step."""
        if not self.trainer.model.training or return_outputs:
            return self.usual(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        predicted = inputs["labels"] != -100
        places = torch.nn.functional.pad(predicted[:, 1:], (0, 1))  # of the tokens before them
        targets = inputs["labels"][:, 1:][predicted[:, 1:]]
        given = {name: value for name, value in inputs.items() if name not in NOT_FOR_LOGITS}
        base = None
        if self._base is not None:
            with torch.no_grad(), self._base:
                base = logits_at(self.trainer.model, places, use_cache=False, **given)
        logits = logits_at(model, places, use_cache=False, **given)
        made = summed(logits, targets, base, self.objective.rows)
        self._note(made, inputs)
        return made.nats / self._divisor(len(targets), num_items_in_batch)

    def _divisor(self, scored: int, counted: Tensor | int | None) -> Tensor | int:
        """What the sum over this batch is divided by, so that the step's gradient is that of a mean
        over its scored tokens, of all micro-batches and processes.
        """
        if counted is None:
            return max(1, scored)
        count = torch.as_tensor(counted).clamp(min=1)
        if self.trainer.args.average_tokens_across_devices:
            return count / self.trainer.accelerator.num_processes
        return count

    def _note(self, made: Summed, inputs: dict[str, Any]) -> None:
        self._cross_entropy += made.cross_entropy
        self._weight += float(made.weights.sum())
        self._scored += len(made.weights)
        mask = inputs.get("attention_mask")
        self._tokens += int(inputs["labels"].numel() if mask is None else mask.sum())

    def logged(self) -> dict[str, float]:
        """Means since the last log."""
        if not self._scored:
            return {}
        numbers = {
            "cross_entropy": self._cross_entropy / self._scored,
            "token_weight": self._weight / self._scored,
            "num_tokens": float(self._tokens * self.trainer.accelerator.num_processes),
        }
        self._cross_entropy, self._weight, self._scored = 0.0, 0.0, 0
        return numbers


def learn_by(trainer: Any, objective: Objective) -> LearnsBy:
    """Let `trainer` learn its rows by `objective`; returns the callback that logs.

    Raises ValueError where the base cannot be asked in this process, and for mixtures of experts
    whose router has a loss of its own, which would be left out.
    """
    if objective.from_base and not engine.has_whole_model(trainer):
        raise ValueError(
            "masked-kl asks the base beside the trainer, which "
            f"{engine.engine_of(trainer)} does not allow; train in one process or with DDP"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "the router of this model has a loss of its own (router_aux_loss_coef), which methods "
            "in place of the cross-entropy would leave out; use --method plain, hold or kl"
        )
    callback = LearnsBy(trainer, objective, trainer.compute_loss)
    trainer.compute_loss = callback.loss
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
