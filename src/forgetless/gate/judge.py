"""What was measured of a tuned model against its bounds: a verdict for each, and one over all.

    judge_bounds(run, bounds)      # list[JudgedBound]
    verdict_over(judged)           # "met", "not shown" or "exceeded": the worst of them

Pure numbers, no model: `run` has what was measured (files/run_json.py). A bound is met where the
whole 95 % interval of the change keeps it, exceeded where none of the interval does, and else not
shown, as a budget is (budget/budget.py). A verdict is so wrong in at most one of forty cases, each
by itself: that all bounds are met needs no correction for their number, since each must be.

How much more would decide: the width of an interval falls with the root of the number that it is
over, but for a rate of which no answer changed it falls with the number itself. So the interval of
a rate is made again as if `lost` and `gained` answers were as frequent among more of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from forgetless.budget.budget import more_to_decide, verdict_of
from forgetless.data.tasks import TASKS
from forgetless.evaluate.behaviour_change import paired_interval
from forgetless.evaluate.conversations import names_not_judged
from forgetless.files.behaviours_json import BehaviourChange
from forgetless.files.gate_json import (
    EXCEEDED,
    MET,
    NOT_SHOWN,
    OF_BEHAVIOUR,
    OF_DIVERGENCE,
    OF_LOSS,
    OF_TASK,
    JudgedBound,
)
from forgetless.files.measured_json import Interval, ScoreChange, Scores
from forgetless.files.run_json import Run
from forgetless.gate.bounds import LENGTH, Bound

# The most that is said of how much more would decide: nobody has more prompts or questions.
MOST = 10_000_000
# What is not taken for another prompt: the rounding of a number that a search ends at.
SEARCH_ROUNDING = 1e-6


def judge_bounds(run: Run, bounds: Sequence[Bound]) -> list[JudgedBound]:
    """Each bound with its verdict; a budget once for each text that it is judged on."""
    judged = []
    for bound in bounds:
        if bound.of == OF_DIVERGENCE:
            judged += _judged_budget(run, bound)
        elif bound.of == OF_BEHAVIOUR:
            judged.append(_judged_behaviour(run, bound))
        else:
            judged.append(_judged_task(run, bound))
    return judged


def verdict_over(judged: Sequence[JudgedBound]) -> str:
    """The worst verdict of all."""
    given = {each.verdict for each in judged}
    return next(verdict for verdict in (EXCEEDED, NOT_SHOWN, MET) if verdict in given)


def _judged_budget(run: Run, bound: Bound) -> list[JudgedBound]:
    """The divergence on the base's own answers, and the rise of the loss on a general text, of
    which at least one was measured.
    """
    judged = []
    for interval in (run.forgetting, run.general):
        if interval is None:
            continue
        on_answers = interval.diverged
        plain = JudgedBound(
            of=OF_DIVERGENCE if on_answers else OF_LOSS,
            name="own answers" if on_answers else "general text",
            bound=bound.text,
            allowed=bound.allowed,
            change=interval.nats,
            low=interval.low,
            high=interval.high,
            number=interval.documents,
            counted="answers" if on_answers else "documents",
        )
        judged.append(_with_verdict(plain, _more_documents(interval, bound.allowed)))
    return judged


def _more_documents(interval: Interval, allowed: float) -> int | None:
    if interval.nats is None or interval.high is None or interval.documents is None:
        return None
    return more_to_decide(interval.nats, interval.high, interval.documents, allowed)


def _judged_behaviour(run: Run, bound: Bound) -> JudgedBound:
    plain = JudgedBound(
        OF_BEHAVIOUR, bound.name, bound.text, allowed=bound.allowed, counted="prompts"
    )
    change = next((each for each in run.behaviours or () if each.name == bound.name), None)
    if change is None:
        return replace(plain, why=_why_not_judged(run, bound.name))
    allowed = bound.allowed
    if bound.name == LENGTH:
        allowed *= change.before or math.nan
    measured = replace(
        plain,
        allowed=allowed,
        before=change.before,
        after=change.after,
        change=change.change,
        low=change.low,
        high=change.high,
        number=change.prompts,
    )
    return _with_verdict(measured, _more_prompts(change, allowed))


def _why_not_judged(run: Run, name: str) -> str:
    """What the run says of a behaviour that no answer could be judged by."""
    said = (str(line) for line in run.not_judged or ())
    lines = (line for line in said if name in names_not_judged(line))
    return next(lines, "no answer could be judged by it")


def _more_prompts(change: BehaviourChange, allowed: float) -> int | None:
    if change.name == LENGTH:
        if change.change is None or change.high is None or change.prompts is None:
            return None
        return more_to_decide(change.change, change.high, change.prompts, allowed)
    return _more_of_rate(change.lost, change.gained, change.prompts, allowed)


def _judged_task(run: Run, bound: Bound) -> JudgedBound:
    before = (run.before.tasks if run.before else {}).get(bound.name) or Scores()
    after = (run.after.tasks if run.after else {}).get(bound.name) or Scores()
    changes = after.changes or {}
    plain = JudgedBound(OF_TASK, bound.name, bound.text, allowed=bound.allowed, counted="questions")
    metric = chosen_metric(bound, list(changes))
    if metric is None:
        known = ", ".join(changes) or "none"
        return replace(
            plain, why=f"no accuracy of this name has a score for each question; there are: {known}"
        )
    change = changes[metric]
    measured = replace(
        plain,
        name=f"{bound.name} {metric}",
        before=before.numbers.get(metric),
        after=after.numbers.get(metric),
        change=change.change,
        low=change.low,
        high=change.high,
        number=change.questions,
    )
    return _with_verdict(measured, _more_questions(change, bound.allowed))


def chosen_metric(bound: Bound, names: Sequence[str]) -> str | None:
    """Which of a task's accuracies a bound is on: the one that it names, by all of its name or by
    one of the parts around its comma; else the one by which choices of our own tasks are ranked in
    a comparison; else the first.
    """
    if bound.metric is not None:
        return next((n for n in names if bound.metric in (n, *n.split(","))), None)
    task = TASKS.get(bound.name)
    if task is not None and task.per_byte and "acc_norm" in names:
        return "acc_norm"
    return next(iter(names), None)


def _more_questions(change: ScoreChange, allowed: float) -> int | None:
    if change.lost is not None:
        return _more_of_rate(change.lost, change.gained, change.questions, allowed)
    if change.change is None or change.high is None or change.questions is None:
        return None
    return more_to_decide(change.change, change.high, change.questions, allowed)


def _more_of_rate(
    lost: int | None, gained: int | None, number: int | None, allowed: float
) -> int | None:
    """How many more answers, of which as many change, would decide a bound on a rate."""
    if lost is None or gained is None or not number:
        return None

    def decides(times: float) -> bool:
        interval = paired_interval(lost * times, gained * times, number * times)
        return _verdict_for(*interval, allowed) != NOT_SHOWN

    if decides(1.0):
        return 0
    low, high = 1.0, 2.0
    while not decides(high):
        low, high = high, 2 * high
        if number * high > MOST:
            return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return max(1, math.ceil(number * (high - 1) - SEARCH_ROUNDING))


def _verdict_for(low: float, high: float, allowed: float) -> str:
    """The verdict on the interval of a change, of which `allowed` says which way is worse."""
    if allowed < 0:
        return verdict_of(-high, -low, -allowed)
    return verdict_of(low, high, allowed)


def _with_verdict(judged: JudgedBound, more: int | None) -> JudgedBound:
    """The bound with its verdict, and with how many more would decide it where that is open."""
    known = (judged.low, judged.high, judged.allowed)
    if any(value is None or not math.isfinite(value) for value in known):
        return replace(judged, why="there are too few for an interval")
    assert judged.low is not None and judged.high is not None and judged.allowed is not None
    verdict = _verdict_for(judged.low, judged.high, judged.allowed)
    return replace(judged, verdict=verdict, more=more if verdict == NOT_SHOWN else None)
