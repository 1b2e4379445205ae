"""How the accuracies of a task changed, paired by question.

    after = with_score_changes(before, after)
    after.tasks["sciq"].changes["acc"]       # ScoreChange(change=-0.02, low=-0.05, high=0.01, ...)

The same questions are asked before and after, so the difference of each is taken: its standard
error leaves out what makes some questions harder than others. Where an answer is right or wrong the
interval is Agresti and Min's, and McNemar's exact test says how likely a change at least so uneven
is where nothing changed (behaviours.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from forgetless.evaluate.behaviour_change import mcnemar, paired_interval
from forgetless.files.measured_json import Measured, ScoreChange, Scores

# Standard errors on either side of a mean that hold 95 % of a normal distribution.
TWO_SIDED_95 = 1.96


def with_score_changes(before: Measured, after: Measured) -> Measured:
    """`after` with what became of every accuracy whose questions are known one by one."""
    tasks = {
        name: None if scores is None else _with_changes(before.tasks.get(name), scores)
        for name, scores in after.tasks.items()
    }
    return replace(after, tasks=tasks)


def _with_changes(before: Scores | None, after: Scores) -> Scores:
    first = (before.items if before is not None else None) or {}
    changes = {
        metric: score_change(first[metric], items)
        for metric, items in (after.items or {}).items()
        if len(first.get(metric, ())) == len(items) > 0
    }
    return replace(after, changes=changes or None)


def score_change(before: Sequence[float | None], after: Sequence[float | None]) -> ScoreChange:
    """The change of a mean score over the same questions, (questions,) each."""
    then, now = np.array(before, dtype=float), np.array(after, dtype=float)
    differences = now - then
    number = len(differences)
    change = float(differences.mean())
    error = standard_error_of_mean(differences.tolist())
    if set(then) | set(now) <= {0.0, 1.0}:
        lost, gained = int((differences < 0).sum()), int((differences > 0).sum())
        low, high = paired_interval(lost, gained, number)
        return ScoreChange(change, error, low, high, number, lost, gained, mcnemar(lost, gained))
    if error is None:
        return ScoreChange(change, questions=number)
    wide = TWO_SIDED_95 * error
    return ScoreChange(change, error, change - wide, change + wide, number)


def standard_error_of_mean(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for a single value."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def error_name(metric: str) -> str:
    """What lm-eval calls the standard error of an accuracy: acc_stderr, and with a filter of the
    answers exact_match_stderr,strict-match.
    """
    name, comma, answer_filter = metric.partition(",")
    return f"{name}_stderr{comma}{answer_filter}"
