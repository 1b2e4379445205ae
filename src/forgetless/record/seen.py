"""How much text one pass of an observing recorder has seen, in this process and in all of them.

seen = Seen()                        # an observing recorder counts what it is shown
seen.of_all_processes(device)        # the counts of all processes
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forgetless.model import distributed


@dataclass
class Seen:
    """How much text one pass has seen so far."""

    tokens: int = 0  # scored
    positions: int = 0  # tokens that count as inputs
    sequences: int = 0  # rows with a scored token
    nats: float = 0.0  # the summed loss on the text itself

    def add(self, is_scored: Tensor, counts: Tensor, nats: float) -> None:
        """Count one batch: where a token is scored and where one counts, (batch, tokens)."""
        self.tokens += int(is_scored.sum())
        self.positions += int(counts.sum())
        self.sequences += int(is_scored.any(1).sum())
        self.nats += nats

    def check(self) -> None:
        """Raise ValueError where there was nothing to see."""
        if self.tokens == 0:
            raise ValueError(
                "nothing was observed: call recorder.observe(input_ids, attention_mask, labels) "
                "on general text first"
            )

    def settings(self) -> dict[str, float]:
        """What the importance file says of the text; `nats` are those per scored token."""
        return {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "nats": self.nats / self.tokens,
        }

    def of_all_processes(self, device: torch.device) -> Seen:
        """What the processes have seen together; every process calls it."""
        counted = distributed.add_up_numbers(
            [self.tokens, self.positions, self.sequences, self.nats], device
        )
        tokens, positions, sequences = (int(number) for number in counted[:3])
        return Seen(tokens, positions, sequences, counted[3])
