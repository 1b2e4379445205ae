"""How behaviours change from one model to another, with the noise of so many answers.

    changes = compared_behaviours(before, after, BEHAVIOURS)   # of `judged_answers`
    changes[0].low, changes[0].high            # the interval of the change of a rate, 95 %
    length_change(said_before, said_after)     # the same of the answers' length in tokens

Both models answer the same prompts with the same random numbers, so their answers are paired. Only
answers that changed say something: `lost` were counted before and not after, `gained` after and not
before. The interval of the difference of the rates is Agresti and Min's (2005, Statistics in
Medicine 24), that of a length Student's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from forgetless.evaluate.behaviours import Behaviour, Said
from forgetless.evaluate.rise import t_quantile
from forgetless.files.behaviours_json import IN_TOKENS, BehaviourChange


def compared_behaviours(
    before: Mapping[str, Mapping[str, bool]],
    after: Mapping[str, Mapping[str, bool]],
    behaviours: Sequence[Behaviour],
) -> list[BehaviourChange]:
    """Each behaviour's change, over the prompts that were judged both times."""
    changes = []
    for behaviour in behaviours:
        first, last = before.get(behaviour.name, {}), after.get(behaviour.name, {})
        pairs = [(first[key], last[key]) for key in first if key in last]
        if pairs:
            changes.append(_change_of_rate(behaviour, pairs))
    return changes


def _change_of_rate(behaviour: Behaviour, pairs: Sequence[tuple[bool, bool]]) -> BehaviourChange:
    number = len(pairs)
    lost = sum(first and not last for first, last in pairs)
    gained = sum(last and not first for first, last in pairs)
    low, high = paired_interval(lost, gained, number)
    return BehaviourChange(
        name=behaviour.name,
        counts=behaviour.counts,
        better=behaviour.better,
        prompts=number,
        before=sum(first for first, _ in pairs) / number,
        after=sum(last for _, last in pairs) / number,
        low=low,
        high=high,
        lost=lost,
        gained=gained,
        p=mcnemar(lost, gained),
    )


def length_change(before: Mapping[str, Said], after: Mapping[str, Said]) -> BehaviourChange:
    """How much longer the answers became, in tokens, as the mean of paired differences."""
    first = np.array([before[key].tokens for key in before], float)
    last = np.array([after[key].tokens for key in before], float)
    longer = last - first
    number = len(longer)
    width = math.nan
    if number > 1:
        error = float(longer.std(ddof=1)) / math.sqrt(number)
        width = t_quantile(0.975, number - 1) * error
    shorter_answers, longer_answers = int((longer < 0).sum()), int((longer > 0).sum())
    return BehaviourChange(
        name="length",
        counts="tokens of an answer",
        unit=IN_TOKENS,
        prompts=number,
        before=float(first.mean()),
        after=float(last.mean()),
        low=float(longer.mean()) - width,
        high=float(longer.mean()) + width,
        lost=shorter_answers,
        gained=longer_answers,
        p=mcnemar(shorter_answers, longer_answers),
    )


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided test of McNemar: lost and gained are as likely if nothing changed."""
    number = lost + gained
    if number == 0:
        return 1.0
    tail = sum(math.comb(number, k) for k in range(min(lost, gained) + 1)) / 2**number
    return min(1.0, 2 * tail)


def paired_interval(
    lost: float, gained: float, number: float, z: float = 1.96
) -> tuple[float, float]:
    """The interval of the change of a rate, gained - lost over `number` pairs.

    Agresti and Min's adjustment (half a pair is added to each of the four cells), which keeps its
    promise at small numbers and is not of width zero where nothing changed.
    """
    total = number + 2
    up, down = gained + 0.5, lost + 0.5
    centre = (up - down) / total
    spread = math.sqrt((up + down) - (up - down) ** 2 / total) / total
    return max(-1.0, centre - z * spread), min(1.0, centre + z * spread)
