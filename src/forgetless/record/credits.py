"""The credits of a path recorder, and the Omega that it has made of them, by weight.

In one process all weights are kept. Of several processes that train one model each keeps the
credits of some of the weights, so that together they take no more memory than one.

    credits = Credits(weights, zeros)
    credits.add(weight, earned, clamp=True)        # one optimizer step
    credits.omega_everywhere(weight)               # in every process, as the owner has it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from forgetless.model import distributed
from forgetless.model.weights import TargetWeight

# The credit, or Omega, of one weight, in the form of its estimator.
CreditParts = tuple[Tensor, ...]


class Credits:
    """Credit of the present epoch and Omega of those before, of the weights that are kept here.

    `zeros` makes what the credit (and Omega) of one weight is kept in.
    """

    def __init__(self, weights: list[TargetWeight], zeros: Callable[[TargetWeight], CreditParts]):
        self.weights, self.zeros = weights, zeros
        self.owner: dict[str, int] = {}  # weight -> process, once there are several
        self.credit: dict[str, CreditParts] = {}
        self.omega: dict[str, CreditParts] = {}
        self.divide()

    def divide(self) -> None:
        """Find out which weights are kept here; what would be another process's is dropped."""
        if distributed.running() and not self.owner:
            self.owner = distributed.owners(
                {weight.name: (weight.name, math.prod(weight.shape)) for weight in self.weights}
            )
        mine = [weight for weight in self.weights if self.keeps(weight)]
        self.credit = {w.name: self.credit.get(w.name) or self.zeros(w) for w in mine}
        self.omega = {w.name: self.omega.get(w.name) or self.zeros(w) for w in mine}

    def keeps(self, weight: TargetWeight) -> bool:
        """Whether the credits of a weight are kept in this process."""
        return self.owner.get(weight.name, 0) == distributed.rank()

    def add(self, weight: TargetWeight, earned: CreditParts, *, clamp: bool) -> None:
        """Add what one step has earned; `clamp`: no credit stays below zero."""
        for credit, more in zip(self.credit[weight.name], earned, strict=True):
            credit.add_(more.to(credit.device))
            if clamp:
                credit.clamp_(min=0)

    def omega_everywhere(self, weight: TargetWeight) -> CreditParts:
        """Omega of one weight, in several processes as its owner has it; all of them call it."""
        omega = self.omega[weight.name] if self.keeps(weight) else self.zeros(weight)
        owner = self.owner.get(weight.name, 0)
        return tuple(distributed.from_owner(part, owner) for part in omega)

    def restore(self, credit: Mapping[str, CreditParts], omega: Mapping[str, CreditParts]) -> None:
        """Have copies of these tensors, each on the device where it is kept."""
        for mine, saved in ((self.credit, credit), (self.omega, omega)):
            for name, parts in saved.items():
                pairs = zip(parts, mine[name], strict=True)
                mine[name] = tuple(part.to(old.device).clone() for part, old in pairs)
