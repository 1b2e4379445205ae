"""The saved state of an observing recorder: what it has added up, and where it stands in the text.

`plain` is what torch.save writes, and what torch.load reads with weights_only: dictionaries, lists,
numbers and tensors. Its keys are those of the files, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from forgetless.record.division import DivisionState
from forgetless.record.seen import Seen
from forgetless.record.state import StateDict


@dataclass(frozen=True)
class ObservingState:
    """Everything that an observing recorder needs to go on later."""

    estimator: str
    targets: list[str]  # names of the target weights
    leaders: dict[str, str]
    passes: DivisionState
    numbers: Seen
    sums: Mapping[str, Mapping[str, Tensor]]
    random: Tensor  # the state of the stream that sampled labels are drawn from

    def plain(self) -> StateDict:
        """As dictionaries, numbers and tensors."""
        return {
            **vars(self),
            "passes": dict(vars(self.passes)),
            "numbers": dict(vars(self.numbers)),
        }

    @staticmethod
    def of(plain: StateDict, estimator: str, targets: list[str]) -> ObservingState:
        """The state that `plain` was made from.

        Raises ValueError where it is not that of this estimator and these target weights.
        """
        if (plain["estimator"], plain["targets"]) != (estimator, targets):
            raise ValueError(
                "the saved recorder state is for other target weights or another estimator; "
                "start again without --resume"
            )
        passes, numbers = DivisionState(**plain["passes"]), Seen(**plain["numbers"])
        return ObservingState(**{**plain, "passes": passes, "numbers": numbers})
