"""How long the demo on a chat model will take, from a few passes of that model on this machine.

    seconds = expected_seconds(model, options)

A pass over some tokens and one step of sampling are measured, and multiplied by how many of them
the demo makes. It leaves out loading and writing, so it is a little too short.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from forgetless.data.selftext import BATCH_ROWS
from forgetless.demo.chat_experiment import ROWS
from forgetless.options.compare import DemoOptions

# Tokens of the pass that is measured.
PASS_TOKENS = 256
# Tokens of one of the guild's conversations, and of a prompt of ours, about.
ROW_LENGTH, PROMPT_LENGTH = 70, 80
# A training step costs so many passes over its tokens: one forward, one and a half backward.
STEP_PASSES = 2.5
# Answers that are kept, which a held step reads beside its rows.
KEPT_IN_A_STEP = 2
# Parts of the answers that are sampled: recorded on, and the two that a comparison measures on.
SAMPLED_PARTS = 3
# Models that answer the prompts of behaviours: the base, plain and held.
JUDGED_MODELS = 3
# Passes over the answers of a part: the base of both parts; and for each of two runs what is stored
# of the base, and base and tuned model at two scales.
ANSWER_PASSES = 2 + 2 * 5
# Recording reads the answers once, and Kronecker factors double the cost.
RECORD_PASSES = 4


def expected_seconds(model: nn.Module, options: DemoOptions) -> float:
    """Seconds of the whole demo, about."""
    device = next(model.parameters()).device
    per_token = _seconds_of(model, torch.ones(1, PASS_TOKENS, dtype=torch.long, device=device))
    per_token /= PASS_TOKENS
    rows = BATCH_ROWS.get(device.type, BATCH_ROWS["cuda"])
    sampling_step = _seconds_of(model, torch.ones(rows, 1, dtype=torch.long, device=device))
    batches = SAMPLED_PARTS * -(-options.answers // rows)
    batches += JUDGED_MODELS * -(-options.behaviours // rows)
    answer = PROMPT_LENGTH + options.answer_length
    step = 2 * ROWS * ROW_LENGTH + KEPT_IN_A_STEP * answer
    training = STEP_PASSES * options.seeds * options.steps * step
    reading = (ANSWER_PASSES * options.seeds + RECORD_PASSES) * options.answers * answer
    return sampling_step * batches * options.answer_length + per_token * (training + reading)


def _seconds_of(model: nn.Module, ids: Any) -> float:
    """Seconds of a forward pass; the first one, which makes room, is not counted."""
    with torch.no_grad():
        model(input_ids=ids)
        started = time.perf_counter()
        float(model(input_ids=ids).logits[0, 0, 0])
    return time.perf_counter() - started
