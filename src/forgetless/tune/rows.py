"""Rows of the domain as the trainer takes them: token ids and labels, cut to --length.

    rows = encode_inputs(options, inputs, base_model, tokenizer)
    rows.training[0]       # {"input_ids": [1, 4, 7], "labels": [-100, 4, 7]}

A label is -100 where nothing is scored, as TRL makes it. A row of which nothing scored is left
within --length is left out, which is said.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.data.domain import encode_rows, truncation_report
from forgetless.data.inputs import Inputs
from forgetless.model.linear import unwrapped
from forgetless.model.loading import context_length
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Rows:
    """Encoded rows: those to train on, and those to evaluate on while training.

    Both are a datasets.Dataset; `evaluated` is None without --eval-steps.
    """

    training: Any
    evaluated: Any


def encode_inputs(options: TuneOptions, inputs: Inputs, model: nn.Module, tokenizer: Any) -> Rows:
    """Encode the rows to train on, and with --eval-steps the held-out ones."""
    training = encoded_rows(options, inputs.training, tokenizer, model)
    evaluated = None
    if options.eval_steps and inputs.held_out.domain is not None:
        evaluated = encoded_rows(options, inputs.held_out.domain, tokenizer, model)
    return Rows(training, evaluated)


def encoded_rows(options: TuneOptions, data: Any, tokenizer: Any, model: nn.Module) -> Any:
    """`data` as token ids and labels, in a datasets.Dataset.

    Says what --length cuts off; raises ValueError where all is lost.
    """
    from datasets import Dataset

    encoded = encode_rows(
        data,
        tokenizer,
        completion_only=options.completion_only is not False,
        end=tokenizer.eos_token or "",
    )
    context = context_length(unwrapped(model))
    length = min(options.length, context)
    if lost := truncation_report(encoded, length, context):
        logger.warning("%s", lost)
    rows = []
    for ids, scored in encoded:
        labels = [
            token if counts else -100 for token, counts in zip(ids[:length], scored, strict=False)
        ]
        if any(label != -100 for label in labels[1:]):
            rows.append({"input_ids": ids[:length], "labels": labels})
    return Dataset.from_list(rows)


def tokens_per_step(options: TuneOptions, encoded: Any) -> float:
    """Scored domain tokens of an optimizer step, on average."""
    scored = sum(label != -100 for labels in encoded["labels"] for label in labels[1:])
    if options.packing:
        sequences = sum(map(len, encoded["labels"])) / options.length
    else:
        sequences = len(encoded)
    return scored / sequences * options.batch_size * options.accumulation
