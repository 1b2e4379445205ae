"""A forgetting budget in words and in a table, for whoever shows one: the terminal after a run, the
page, markdown and model cards.

    print("\\n".join(sentences(run.budget)))     # in the terminal
    kept_in_words(run)                          # one sentence, on the page
    in_one_line(run.budget)                     # on a model card
    budget_table(run.budget)                    # what other budgets would have bought

Budgets are kept on the loss, in nats per token; per cent are of perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from forgetless.files.budget_json import (
    Bought,
    BudgetCheck,
    BudgetReport,
    CalibrationUsed,
    CurvePoint,
    PredictedRise,
)
from forgetless.files.measured_json import DIVERGENCE, Change
from forgetless.files.run_json import Run
from forgetless.files.schema import GENERAL
from forgetless.report import numbers, terminal
from forgetless.report.cells import Cell, Table, number_cell, table_of, text_cell
from forgetless.report.numbers import perplexity_percent

# A verdict as the terminal says it.
LOUD = {"met": "met", "not shown": "NOT SHOWN", "exceeded": "EXCEEDED"}


def sentences(report: BudgetReport) -> list[str]:
    """The report in plain English, a line each."""
    predicted = report.verdict == "predicted"
    lines = [
        *(_predicted_lines(report) if predicted else _checked_lines(report)),
        _what_is_kept(report),
    ]
    if report.learning is not None:
        lines.append(_learning_line(report, report.learning))
    if len(report.each) > 1:
        ways = (_bought_in_words(f"{way}:", bought) for way, bought in report.each.items())
        lines.append(f"  each way within this budget, on the control part: {'; '.join(ways)}")
    others = [
        _bought_in_words(f"with {name}", bought)
        for name, bought in report.others.items()
        if name != report.budget
    ]
    return [*lines, f"  you would get: {'; '.join(others)}"] if others else lines


def _checked_lines(report: BudgetReport) -> Iterator[str]:
    """What the check said."""
    check = report.check or BudgetCheck()
    among = ""
    if check.each:
        among = f" of {check.on}, of {len(check.each)} sources the nearest to the budget,"
    verdict = LOUD.get(str(report.verdict), str(report.verdict))
    allowed = f"{_limit(report)} nats per token of {_kept_on(report)}"
    yield f"budget {report.budget} ({allowed}): {verdict}"
    yield (
        f"  checked on {numbers.shown(check.documents)} {_pieces(report)}{among} kept for this: "
        f"rise {_perplexity_rise(check.nats)} of perplexity ({_signed(check.nats)} nats), between "
        f"{_signed(check.low)} and {_signed(check.high)}; promised at most "
        f"{_signed(report.promised)}"
    )
    yield f"  ({report.how})"
    if report.verdict == "not shown":
        kind = f"more {_pieces(report)}" if check.on == GENERAL else "more held-out rows"
        more = report.documents_to_decide
        needed = "more text" if more is None else f"about {more} {kind}"
        yield f"  the budget lies within this interval; {needed} would decide"
    if report.verdict == "exceeded":
        yield (
            "  the check part forgets more than the control part does, also after a fallback: is "
            "the general text of one kind? Use a smaller budget"
        )


def _predicted_lines(report: BudgetReport) -> Iterator[str]:
    """What was predicted, how well that is known, and how to find out."""
    rise = report.predicted or PredictedRise()
    known = report.calibration or CalibrationUsed()
    yield (
        f"budget {report.budget} ({_limit(report)} nats per token of {_kept_on(report)}): "
        "PREDICTED, not measured"
    )
    yield (
        f"  predicted by the importance file: rise {_perplexity_rise(rise.nats)} of perplexity "
        f"({_signed(rise.nats)} nats); of 20 such updates, 19 are expected below "
        f"{_signed(rise.bound)}"
    )
    yield (
        f"  (calibrated on {numbers.shown(known.updates)} updates: what energy costs is off by a "
        f"factor of {_formatted(known.error, '.2g')} typically, "
        f"{_formatted(known.factor, '.2g')} at most 19 times in 20, for training and text like "
        "theirs)"
    )
    if _own(report):
        yield (
            "  the base was not asked: forgetless check MODEL OUT measures what was lost; tune "
            "without --general none to check it"
        )
        return
    yield (
        "  no general text was looked at: forgetless eval MODEL --adapter OUT/final --general "
        "TEXT measures what was lost; tune with --general to check it"
    )


def _what_is_kept(report: BudgetReport) -> str:
    if report.fraction == 1:
        return "  all of the update is kept: the budget was not used up"
    if report.fraction:
        return f"  the update was {_how(report)}"
    more = ", or --general TEXT" if report.verdict == "predicted" else " or more general text"
    return (
        "  no part of the update keeps this budget: the result is the model as it was. Give a "
        f"larger budget{more}"
    )


def _learning_line(report: BudgetReport, learning: Change) -> str:
    lost = "predicted forgetting" if report.verdict == "predicted" else "forgetting"
    per = ""
    if report.learning_per_nat is not None:
        per = f", {report.learning_per_nat:.3g} nats for each nat of {lost}"
    learned = _formatted(learning.nats, ".4f")
    return f"  learning {learned} nats per token on {report.learning_on}{per}"


def _how(bought: Bought | BudgetReport) -> str:
    """How far an update was made smaller."""
    if bought.fraction == 1:
        return "all of it"
    if bought.mu is None:
        return f"scaled by {_formatted(bought.fraction, '.3g')}"
    return f"shrunk along importance at mu {bought.mu:.3g}"


def _bought_in_words(name: str, bought: Bought | None) -> str:
    """What one way, or one budget, buys."""
    if bought is None or not bought.fraction:
        return f"{name} nothing"
    learning = "" if bought.learning is None else f", learning {bought.learning:.4f}"
    return f"{name} {_how(bought)}{learning}"


def kept_in_words(run: Run) -> str:
    """What became of the budget of a run, in one or two sentences."""
    report = run.budget or BudgetReport()
    verdict = f"The budget of {run.configuration.get('budget')}: {run.verdict}."
    if report.budget_nats is None:
        return verdict
    predicted = report.predicted or PredictedRise()
    if predicted.nats is not None and predicted.bound is not None:
        looked = "The base was not asked" if _own(report) else "No general text was looked at"
        return (
            f"{verdict} By the importance file's calibration {_what_rose(report)} by "
            f"{predicted.nats:.4f} nats per token, and by at most {predicted.bound:.4f} for 19 of "
            f"20 such updates; the budget is {report.budget_nats:.4f}. {looked}."
        )
    check = report.check or BudgetCheck()
    if check.low is None or check.high is None:
        return verdict
    return (
        f"{verdict} On {numbers.shown(check.documents)} {_pieces(report)} that nothing was chosen "
        f"on {_what_rose(report)} by {check.low:.4f} to {check.high:.4f} nats per token; the "
        f"budget is {report.budget_nats:.4f}."
    )


def _own(report: BudgetReport) -> bool:
    """Whether the budget was kept on what the base says itself."""
    if report.calibration is not None:
        return report.calibration.data.get("of") == DIVERGENCE
    return report.control is not None and report.control.diverged


def _kept_on(report: BudgetReport) -> str:
    return "the model's own answers" if _own(report) else "general text"


def _pieces(report: BudgetReport) -> str:
    return "answers" if _own(report) else "documents"


def _what_rose(report: BudgetReport) -> str:
    if _own(report):
        return "the model moved from its base"
    return "the general loss rose" if report.predicted is not None else "the loss rose"


def in_one_line(report: BudgetReport) -> str:
    """A budget with what was checked or predicted, for a list."""
    budget = f"{report.budget} ({_limit(report)} nats per token)"
    if report.predicted is not None:
        return (
            f"{budget}: predicted, not measured; by the importance file's calibration "
            f"{_what_rose(report)} by {_formatted(report.predicted.nats, '.4f')}, and by at most "
            f"{_formatted(report.predicted.bound, '.4f')} for 19 of 20 such updates"
        )
    check = report.check or BudgetCheck()
    return (
        f"{budget}: {report.verdict}; on {numbers.shown(check.documents)} {_pieces(report)} that "
        f"nothing was chosen on, {_what_rose(report)} by {_formatted(check.nats, '.4f')}, between "
        f"{_formatted(check.low, '.4f')} and {_formatted(check.high, '.4f')}"
    )


def curve_table(report: BudgetReport) -> str:
    """Each way's curve on the control part, or as predicted, as a table in the terminal."""
    rise = "predicted rise" if report.verdict == "predicted" else "general perplexity"
    return terminal.table(
        ["way", "fraction", "mu", rise, "learning (nats)"],
        [
            [
                point.way,
                _formatted(point.fraction, ".3f"),
                _formatted(point.mu, ".3g"),
                _perplexity_rise(None if point.rise is None else point.rise.nats),
                _formatted(point.learning, ".4f"),
            ]
            for point in report.curve
        ],
    )


def budget_table(report: BudgetReport) -> Table:
    """What a smaller or a larger budget would have bought, beside this one."""
    own = Bought(fraction=report.fraction, mu=report.mu)
    rows = [(numbers.shown(report.budget), report.budget_nats, own, "this one")]
    for name, bought in report.others.items():
        if bought is not None and name != str(report.budget):
            rows.append((name, _budget_in_nats(name), bought, ""))
    rows.sort(key=lambda row: (row[1] is None, row[1] or 0.0))
    learning = report.learning or Change()
    lines = [
        [
            text_cell(name),
            number_cell(nats, show=lambda value: f"{value:.4f}"),
            Cell(fraction_in_words(bought)),
            number_cell(learning.nats, learning.standard_error)
            if mark
            else number_cell(bought.learning),
            Cell(mark),
        ]
        for name, nats, bought, mark in rows
    ]
    return table_of(["budget", "nats per token", "what is kept", "learning", ""], lines)


def fraction_in_words(bought: Bought | CurvePoint) -> str:
    """How much of an update is left, in a cell of a table."""
    if bought.fraction is None:
        return numbers.MISSING
    if bought.fraction in (0.0, 1.0):
        return "all of the update" if bought.fraction else "nothing of it"
    if bought.mu is None:
        return f"update {numbers.TIMES} {bought.fraction:.2g}"
    return f"update shrunk along importance, mu {bought.mu:.2g}"


def _budget_in_nats(name: str) -> float | None:
    """'2%' in nats per token."""
    try:
        return math.log1p(float(name.rstrip("% ")) / 100)
    except ValueError:
        return None


def _limit(report: BudgetReport) -> str:
    return _formatted(report.budget_nats, ".4g")


def _perplexity_rise(nats: float | None) -> str:
    """A rise as one of perplexity: '+0.33 %'."""
    return numbers.MISSING if nats is None else f"{perplexity_percent(nats):+.2f} %"


def _signed(nats: float | None) -> str:
    return _formatted(nats, "+.5f")


def _formatted(value: float | None, form: str) -> str:
    """A number in this form; a dash where it is missing."""
    return numbers.MISSING if value is None else f"{value:{form}}"
