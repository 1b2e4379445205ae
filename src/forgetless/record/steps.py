"""One optimizer step of the short trainings that record and calibrate.

A step follows the mean cross-entropy of all scored tokens in its micro-batches, shared out over the
processes; the gradient is neither clipped nor regularised.

    loss, tokens = step(model, optimizer, group)         # nats per token
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forgetless.model import distributed

# Each epoch shuffles by a seed of its own: so many epochs are apart from those of the next seed.
EPOCH_SEEDS = 1000

Batch = dict[str, Tensor]  # input_ids, attention_mask and labels, each (batch, tokens)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, group: Sequence[Batch]
) -> tuple[float, int]:
    """One optimizer step on the mean cross-entropy of all scored tokens in the group; (nats per
    token, tokens).

    No step is taken where the loss is no number.
    """
    device = next(model.parameters()).device
    tokens = scored_tokens(group)
    loss, processes = 0.0, distributed.world_size()
    for batch in _of_this_process(group):
        # The gradients' mean over processes is then that of all tokens.
        nats = backward(model, batch, processes / max(tokens, 1))
        loss += nats / max(tokens, 1)
    [loss] = distributed.add_up_numbers([loss], device)
    distributed.average_gradients([p for p in model.parameters() if p.requires_grad])
    if math.isfinite(loss):
        optimizer.step()
    optimizer.zero_grad()
    return loss, tokens


def backward(model: nn.Module, batch: Batch, factor: float) -> float:
    """Add the gradient of `factor` times the summed cross-entropy of what is scored in a padded
    batch; returns that sum, in nats.
    """
    here = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    output = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"])
    logits = output.logits[:, :-1]
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        here["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    (nats * factor).backward()
    return float(nats.detach())


def scored_tokens(group: Sequence[Batch]) -> int:
    """How many tokens are scored in some batches."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)


def _of_this_process(group: Sequence[Batch]) -> Sequence[Batch]:
    """What this process takes of a step: whole micro-batches where they go round, else some rows of
    each.
    """
    if len(group) % distributed.world_size() == 0:
        return distributed.shard(group)
    rows = slice(distributed.rank(), None, distributed.world_size())
    return [
        {key: value[rows] for key, value in batch.items()}
        for batch in group
        if len(batch["input_ids"]) > distributed.rank()
    ]
