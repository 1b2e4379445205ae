"""What a sequence of domains leaves behind, from the losses after each step.

Pure functions; standard library only.

L[i][j] is the loss on domain j after step i, in nats per token; row 0 is the base model, and the n
domains are learned in the order of the columns. As for accuracies (Lopez-Paz & Ranzato 2017, arXiv
1706.08840), with the sign turned so that positive is good:

    average             mean over j of L[n][j]
    backward transfer   mean over j < n of L[j][j] - L[n][j]
                        what later domains did to earlier ones; negative: forgotten
    forward transfer    mean over j > 1 of L[0][j] - L[j-1][j]
                        what earlier domains did for later ones, before these were learned

Where several domains are learned in one step, or some before the first that is measured, `learned`
says for each domain after which row it is; where some domains are left out, `steps` says how many
there were.

    transfer([[4.0, 5.0], [3.0, 4.8], [3.2, 3.9]])     # average 3.55, backward -0.2, forward 0.2

Accuracies (of the domains that are tasks) have their own sign: `of_accuracy`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def transfer(
    losses: Sequence[Sequence[float]],
    learned: Sequence[int] | None = None,
    *,
    steps: int | None = None,
) -> dict[str, float | None]:
    """The three numbers, in nats per token; no transfer for a single domain, nothing before the
    last step is done.
    """
    n = len(losses[0])
    at = list(learned or range(1, n + 1))
    last = steps or max(at)
    if len(losses) != last + 1:
        return {"average": None, "backward_transfer": None, "forward_transfer": None}
    back = [losses[at[j]][j] - losses[last][j] for j in range(n) if at[j] < last]
    ahead = [losses[0][j] - losses[at[j] - 1][j] for j in range(n) if at[j] > 1]
    mean = lambda values: statistics.fmean(values) if values else None
    return {
        "average": mean(losses[last]),
        "backward_transfer": mean(back),
        "forward_transfer": mean(ahead),
    }


def of_accuracy(
    accuracies: Sequence[Sequence[float]],
    learned: Sequence[int] | None = None,
    *,
    steps: int | None = None,
) -> dict[str, float | None]:
    """The same of a matrix of accuracies, from 0 to 1: larger is better, so backward transfer is
    the mean of R[n][j] - R[j][j].
    """
    turned = transfer([[-value for value in row] for row in accuracies], learned, steps=steps)
    return {**turned, "average": None if turned["average"] is None else -turned["average"]}
