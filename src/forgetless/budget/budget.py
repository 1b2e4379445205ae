"""A forgetting budget: how much the loss on general text may rise, whether it did, and what a text
can show of it. Pure numbers, no model.

    budget     "1%" of perplexity is log(1.01) nats per token; "0.01nats" is taken as it is
    verdict    on the check part: met (upper end of the rise's interval within the budget), exceeded
               (lower end above), not shown (the budget lies inside)
    planned    from the control part: the value that the check's upper end will stay below 19 times
               in 20

The interval itself is evaluate/rise.py's, how hard to hold is controller.py's.

    budget = parse("1%")                               # Budget(nats=0.00995, text="1%")
    verdict_on(rise, budget.nats)                      # "met"
    planned_bound(rise, check_documents=150, error=0.025)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from forgetless.errors import OptionError
from forgetless.evaluate.rise import Rise, t_quantile
from forgetless.files.provenance import sha256_text

# The quantile of the difference between the two parts that lets the check be met 19 times in 20:
# above 0.95, since the noise is itself an estimate (simulated in tests/test_budget.py).
PLANNED = 0.98
# The fraction of a budget that a check part should let a rise use, for which it is said how much
# text that takes.
WANTED = 0.8


@dataclass(frozen=True)
class Budget:
    """The largest rise of the general loss that is allowed, in nats per token, and how it was
    written.
    """

    nats: float
    text: str


def parse(text: str) -> Budget:
    """'1%' of perplexity, or '0.01nats' per token.

    Raises OptionError for anything else and for budgets of nothing.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%|nats?)\s*", str(text))
    try:
        value = float(match.group(1)) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or not math.isfinite(value):
        raise OptionError(
            "--budget expects a rise of perplexity like 1% or of the loss like 0.01nats, found "
            f"'{text}'"
        )
    if value <= 0:
        raise OptionError(
            f"--budget must be above 0, found '{text}': only the base model itself loses nothing"
        )
    nats = math.log1p(value / 100) if match.group(2) == "%" else value
    return Budget(nats, "".join(str(text).split()))


def split(texts: Sequence[str], sources: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the control part and of the check part: by the hash of the text, half of each
    source, the same whatever the order of the documents.

    Copies of one text stay together. The odd text of a source goes to the part that has fewer so
    far.
    """
    by_source: dict[str, dict[str, list[int]]] = {}
    for index, (text, source) in enumerate(zip(texts, sources, strict=True)):
        by_source.setdefault(source, {}).setdefault(sha256_text(text), []).append(index)
    parts: tuple[list[int], list[int]] = ([], [])
    for source in sorted(by_source):
        first = 0 if len(parts[0]) <= len(parts[1]) else 1
        for place, digest in enumerate(sorted(by_source[source])):
            parts[(first + place) % 2].extend(by_source[source][digest])
    return sorted(parts[0]), sorted(parts[1])


def verdict_on(rise: Rise, budget: float) -> str:
    """What an interval says of a budget: "met", "exceeded" or "not shown"."""
    return verdict_of(rise.low, rise.high, budget)


def verdict_of(low: float, high: float, allowed: float) -> str:
    """The same of any interval, whose values are the worse the larger they are."""
    if high <= allowed:
        return "met"
    return "exceeded" if low > allowed else "not shown"


def documents_to_decide(rise: Rise, budget: float) -> int | None:
    """About how many more documents (of as many more sources) would move the budget out of the
    interval; None where the rise is the budget itself.
    """
    return more_to_decide(rise.nats, rise.high, rise.documents, budget)


def more_to_decide(value: float, high: float, number: int, allowed: float) -> int | None:
    """The same of any value whose interval up to `high` becomes narrower with the root of the
    number that it is over.
    """
    distance = abs(allowed - value)
    if distance == 0:
        return None
    return max(0, math.ceil(number * (((high - value) / distance) ** 2 - 1)))


def planned_bound(rise: Rise, check_documents: int, *, error: float) -> float:
    """The value that the check part's upper end stays below 19 times in 20, predicted from the
    control part's rise.

    The check has its own noise: an update chosen so that the control part's upper end just meets
    the budget would fail the check half of the time. So this is the rise, plus the check's half
    width, plus a high quantile of how much the two parts' upper ends differ: by documents only,
    since both parts hold the same sources; through the rise and through the width itself.
    """
    ratio = math.sqrt(rise.documents / check_documents)
    t = t_quantile(1 - error / 2, rise.degrees)
    by_source = rise.by == "source"
    through_width = t**2 / (rise.clusters if by_source else 2 * rise.degrees)
    noise = rise.within * math.hypot(1, ratio) * math.sqrt(1 + through_width)
    return (
        rise.nats
        + t * rise.standard_error * (1 if by_source else ratio)
        + t_quantile(PLANNED, rise.degrees) * noise
    )


def check_reach(spread: Rise, check_documents: int, budget: Budget, *, error: float) -> None:
    """Raise ValueError where the check could not show the budget even if the true rise were zero.

    `spread` is the interval of an update that costs about the budget in a random direction, which
    sets how far apart documents move; fine-tuning moves them at least as far apart
    (docs/budget.md), so text that fails here is too short for certain.
    """
    width = (
        t_quantile(1 - error / 2, spread.degrees)
        * spread.standard_error
        * math.sqrt(spread.documents / check_documents)
    )
    if width <= budget.nats:
        return
    needed = math.ceil(2 * check_documents * (width / budget.nats) ** 2)
    few = ""
    if spread.by == "source":
        few = (
            f"; its {spread.clusters} sources count for {spread.effective:.1f}, so more sources "
            "help most"
        )
    raise ValueError(
        f"the general text is too short to show a budget of {budget.text} ({budget.nats:.4g} "
        "nats): half of it is kept for the check, and there "
        f"the rise is known to +- {width:.2g} nats at best. Give about {needed} documents (found "
        f"{2 * check_documents}){few}, "
        "or a larger budget"
    )


@dataclass(frozen=True)
class Showing:
    """What a check part can show of a budget: the fraction of it that a rise may use and still be
    met 19 times in 20, and how many documents each part needs for `wanted` of it.
    """

    usable: float
    wanted: float
    documents: int


def showing(
    spread: Rise, check_documents: int, budget: Budget, *, error: float, own: bool
) -> Showing:
    """What the check can show, by the `spread` of an update that costs about the budget.

    The noise of a divergence on the model's `own` answers is in proportion to it, so that the
    fraction is the same for every budget; that of a text is what it is at the budget, and needs a
    number of documents that grows with the inverse square of what it may be. Fine-tuning moves
    documents further apart than the random update of `spread` does, so more is needed than this
    says: on a real chat model the divergence of an answer varied by .3 to .8 of the mean.
    """
    beyond = max(planned_bound(spread, check_documents, error=error) - spread.nats, 0.0)
    if own:
        usable = spread.nats / (spread.nats + beyond)
        allowed = spread.nats * (1 / WANTED - 1)
    else:
        usable = max(0.0, 1 - beyond / budget.nats)
        allowed = budget.nats * (1 - WANTED)
    return Showing(usable, WANTED, math.ceil(check_documents * (beyond / allowed) ** 2))
