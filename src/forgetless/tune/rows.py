"""TODO tune.rows."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from forgetless.data.tasks import encode_rows, truncation_report
from forgetless.model.linear import unwrapped
from forgetless.model.loading import context_length
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")


def encoded_rows(options: TuneOptions, data: Any, tokenizer: Any, model: nn.Module) -> Any:
    """`data` as token ids and labels (-100 where nothing is scored), as TRL makes them.

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
        labels = [token if one else -100 for token, one in zip(ids[:length], scored, strict=False)]
        if any(label != -100 for label in labels[1:]):
            rows.append({"input_ids": ids[:length], "labels": labels})
    return Dataset.from_list(rows)


def tokens_per_step(options: TuneOptions, encoded: Any) -> float:
    """Scored domain tokens of an optimizer step, on average."""
    scored = sum(label != -100 for labels in encoded["labels"] for label in labels[1:])
    sequences = (
        sum(map(len, encoded["labels"])) / options.length if options.packing else len(encoded)
    )
    return scored / sequences * options.batch_size * options.accumulation
