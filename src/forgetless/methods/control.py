"""`general-steps`: the control that takes stage 1's training apart from its importance.

The adapter is trained on general text as `record --estimator path` trains it (cross-entropy, AdamW,
constant learning rate, no clipping), then tuned plainly on the domain. What it forgets less than
`plain` comes from having seen general text, not from any penalty. It makes one pass over --replay's
text, or --general-steps optimizer steps.
"""

from __future__ import annotations

import torch
from torch import nn

from forgetless.data.encoding import batches
from forgetless.methods.method import Setup
from forgetless.methods.terms import count_scored, cross_entropy, places


def general_steps(setup: Setup, model: nn.Module) -> None:
    """Train `model` in place; the sequences of a step depend on the seed and the step alone."""
    o, text = setup.options, list(setup.text)
    per_step = o.batch_size * o.accumulation
    steps = -(-len(text) // per_step) if o.general_steps is None else o.general_steps
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=o.learning_rate, weight_decay=0.0
    )
    training = model.training
    model.train()
    for step in range(steps):
        seen = places(len(text), step * per_step, (step + 1) * per_step, o.seed)
        pieces = [text[i] for i in seen]
        for batch in batches(pieces, batch_size=o.batch_size, pad_id=setup.tokenizer.pad_token_id):
            (cross_entropy(model, batch) / count_scored(pieces)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train(training)
