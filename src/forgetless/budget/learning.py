"""What learning is measured on while an update is made to fit a budget: some rows of domain data,
with the base model's loss on each.

    learning = domain(model, rows, "domain.jsonl")       # costs one evaluation of the base
    learning.of(tuned).nats                              # the fall of the loss, in nats per token
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from forgetless.data.encoding import Encoded
from forgetless.evaluate.losses import LONGEST_WINDOW, last_window
from forgetless.evaluate.paired import PairedText, pair_with
from forgetless.evaluate.rise import ERROR_LEVEL, Rise
from forgetless.model.loading import context_length

# Tokens of domain data, of an earlier domain too, that are evaluated at every fraction of a scan.
LEARNING_TOKENS = 30_000


@dataclass(frozen=True)
class Learning:
    """Domain data with the base's losses, and what to call it."""

    part: PairedText
    name: str

    def of(self, model: nn.Module) -> Rise:
        """The fall of the loss, in nats per token. Costs one evaluation."""
        return -self.part.rise(model, error=ERROR_LEVEL)


def domain(model: nn.Module, rows: list[Encoded], name: str) -> Learning:
    """Domain data of at most LEARNING_TOKENS tokens, evenly taken from `rows`, measured on the
    base. A row too long for the window loses its beginning.

    Raises ValueError where there are fewer than two rows with something to score.
    """
    rows, window = fitting(model, rows, name)
    if len(rows) < 2:
        raise ValueError(
            f"{name}: learning is measured on at least two rows of domain data, found "
            f"{len(rows)}; give more"
        )
    return Learning(pair_with(model, rows, ["domain"] * len(rows), window), name)


def fitting(
    model: nn.Module, rows: list[Encoded], name: str, *, least: int = 2
) -> tuple[list[Encoded], int]:
    """Rows of about LEARNING_TOKENS tokens, but at least `least` of them, evenly taken and cut to
    the window; and the window.

    Raises ValueError where no row has a token to score.
    """
    window = min(LONGEST_WINDOW, context_length(model))
    rows = [last_window(row, window) for row in rows]
    rows = [row for row in rows if any(row[1][1:])]
    if not rows:
        raise ValueError(
            f"{name}: no row has a token to score; expected text of at least two tokens, "
            "completions, or chats with assistant turns"
        )
    every = math.ceil(sum(len(ids) for ids, _ in rows) / LEARNING_TOKENS)
    return rows[:: max(1, min(every, len(rows) // least))], window
