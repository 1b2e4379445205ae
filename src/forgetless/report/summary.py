"""The headline of a comparison: who forgets least at equal learning, in one number per domain and
text.
"""

from __future__ import annotations

from dataclasses import replace

from forgetless.files.compare_json import Comparison, EqualLearning
from forgetless.report import numbers
from forgetless.report.cells import Headline
from forgetless.report.contents import diverges, label
from forgetless.report.run_headlines import run_headlines

# Lines that a figure can hold without a tangle.
FEW = 9


def headlines(contents: Comparison, text: str | None) -> list[Headline]:
    """One headline per domain on this general text; of a single run, what was learned and what was
    lost.
    """
    if contents.kind == "run":
        return list(run_headlines(contents))
    if text is None:
        return []
    each = (_of_domain(contents, domain.name, text) for domain in contents.domains)
    return [headline for headline in each if headline is not None]


def equal_rows(contents: Comparison, domain: str, text: str) -> list[EqualLearning]:
    """Forgetting at equal learning of one domain and text, of methods that ran.

    One without a finished run has not failed to learn: its status says so.
    """
    rows = (contents.equal_learning.get(domain) or {}).get(text) or []
    part = next((row.part for row in rows if row.part), None)  # all rows are of one
    finished: dict[str, bool] = {}
    for run in contents.runs:
        if run.domain == domain:
            counts = run.done and part in (None, run.part)
            finished[run.method] = finished.get(run.method, False) or counts
    return [
        row if finished[row.method] else replace(row, status="no finished run")
        for row in rows
        if row.method in finished
    ]


def hidden_at_first(contents: Comparison, text: str | None) -> list[str]:
    """Methods whose lines wait for a click where there are many: all but plain, ours and those that
    forget least, by their places over domains and levels of learning.
    """
    names = [method.name for method in contents.methods]
    if len(names) <= FEW:
        return []
    places = _summed_places(contents, str(text), names)
    ours = [
        method.name
        for method in contents.methods
        if method.family == "hold" or method.name == contents.reference
    ]
    others = sorted((name for name in names if name not in ours), key=lambda name: places[name])
    hidden = others[max(0, FEW - len(ours)) :]
    return [name for name in names if name in hidden]


def _summed_places(contents: Comparison, text: str, names: list[str]) -> dict[str, int]:
    """The sum of each method's places, the least forgetting first, over domains and levels. Every
    level counts: one alone would hide a strong method that just misses it.
    """
    places = dict.fromkeys(names, 0)
    for domain in contents.domains:
        rows = equal_rows(contents, domain.name, text)
        for level in {row.level for row in rows}:
            order = [row.method for row in _by_forgetting(rows, level)]
            for name in names:
                places[name] += order.index(name) if name in order else len(names)
    return places


def _by_forgetting(rows: list[EqualLearning], level: float) -> list[EqualLearning]:
    reached = [row for row in rows if row.level == level and row.forgetting is not None]
    return sorted(reached, key=lambda row: row.forgetting or 0.0)


def _of_domain(contents: Comparison, domain: str, text: str) -> Headline | None:
    rows = [row for row in equal_rows(contents, domain, text) if row.forgetting is not None]
    if not rows:
        return None
    level = max(row.level for row in rows)
    reached = {row.method: row for row in rows if row.level == level}
    best = _by_forgetting(list(reached.values()), level)[0]
    plain = reached.get(contents.reference)
    name = label(contents, best.method)
    place = f"{domain}, measured on {_named_text(contents, text)}"
    if best is plain:
        return Headline(
            _forgotten(best),
            f"nats forgotten by {name}: nothing here forgets less",
            f"at {numbers.percent(level)} of its learning, no other method comes out below it",
            place,
        )
    if plain is None:
        return Headline(
            _forgotten(best),
            f"nats forgotten with {name}, the least here",
            f"at {numbers.percent(level)} of plain fine-tuning's learning, which plain "
            "fine-tuning is not measured at",
            place,
        )
    return _against_plain(contents, best, plain, (domain, text))


def _against_plain(
    contents: Comparison, best: EqualLearning, plain: EqualLearning, where: tuple[str, str]
) -> Headline:
    """The headline where another method than plain fine-tuning forgets least, both measured."""
    name = label(contents, best.method)
    detail = (
        f"{_forgotten(best)} instead of {_forgotten(plain)} nats per token, at "
        f"{numbers.percent(best.level)} of its learning"
    )
    place = f"{where[0]}, measured on {_named_text(contents, where[1])}"
    noise = _beyond_noise(contents, where, best)
    lost, lost_by_plain = best.forgetting or 0.0, plain.forgetting or 0.0
    if lost <= 0:
        return Headline("0", f"nats forgotten with {name}", detail, place, noise)
    against = label(contents, contents.reference)
    return Headline(
        _how_many_times(lost_by_plain / lost),
        f"less forgetting with {name} than with {against}",
        detail,
        place,
        noise,
    )


def _named_text(contents: Comparison, text: str) -> str:
    """A general text, or what it is where the base says it itself."""
    return f"the base's own answers ({text})" if diverges(contents, text) else text


def _forgotten(row: EqualLearning) -> str:
    return numbers.nats(row.forgetting, row.standard_error)


def _how_many_times(ratio: float) -> str:
    if ratio > 100:
        shown = "over 100"
    elif ratio >= 20:
        shown = f"{ratio:.0f}"
    else:
        shown = f"{ratio:.1f}"
    return shown + numbers.TIMES


def _beyond_noise(contents: Comparison, where: tuple[str, str], best: EqualLearning) -> str:
    """Whether the best method's difference to plain fine-tuning is beyond the noise."""
    for row in contents.differences:
        methods = {row.a, row.b} == {best.method, contents.reference}
        if methods and (row.domain, row.text, row.level) == (*where, best.level):
            known = {True: "beyond the noise", False: "within the noise"}
            return "noise not measured" if row.beyond_noise is None else known[row.beyond_noise]
    return "noise not measured"
