"""The saved state of a path recorder; of several processes, what each of them keeps.

`plain` is what torch.save writes, and what torch.load reads with weights_only: dictionaries,
numbers and tensors. Its keys are those of the files, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from forgetless.record.credits import CreditParts
from forgetless.record.state import StateDict


@dataclass(frozen=True)
class PathNumbers:
    """How far a path recorder has come."""

    steps: int
    skipped: int
    epochs: int
    decrease: float
    in_epoch: int  # steps since the last epoch ended


@dataclass(frozen=True)
class PathState:
    """Everything that a path recorder needs to go on later."""

    estimator: str
    numbers: PathNumbers
    credit: Mapping[str, CreditParts]
    omega: Mapping[str, CreditParts]

    def plain(self) -> StateDict:
        """As dictionaries, numbers and tensors."""
        return {**vars(self), "numbers": dict(vars(self.numbers))}

    @staticmethod
    def of(plain: StateDict, estimator: str, weights: Collection[str]) -> PathState:
        """The state that `plain` was made from.

        Raises ValueError where it is not that of this estimator and of these weights.
        """
        if plain["estimator"] != estimator or set(plain["credit"]) != set(weights):
            raise ValueError(
                "the saved recorder state is for other target weights or another estimator; "
                "start again without --resume"
            )
        return PathState(**{**plain, "numbers": PathNumbers(**plain["numbers"])})
