"""What a single run's page starts with: how much was learned, what was kept, whether the budget
held, and what became of behaviours, in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from forgetless.files.behaviours_json import IN_TOKENS, BehaviourChange
from forgetless.files.budget_json import BudgetReport
from forgetless.files.compare_json import Comparison
from forgetless.files.gate_json import MET, Gate
from forgetless.files.measured_json import Change
from forgetless.report import numbers
from forgetless.report.behaviours import CHANGED, shown_tokens
from forgetless.report.cells import Headline

# What is at most said of behaviours beside the table.
MOST_SENTENCES = 6


def run_headlines(contents: Comparison) -> Iterator[Headline]:
    """Learned, lost and the budget; of a checked model, how many bounds are met."""
    if contents.gate is not None:
        yield _checked_headline(contents.gate)
        return
    point = contents.runs[0].points[0]
    text, domain = contents.texts[0].name, contents.domains[0].name
    learning, forgetting = point.learning or Change(), point.forgetting[text] or Change()
    plain_learned, plain_lost = _of_plain(contents)
    own = _is_divergence(contents)
    what = "divergence from the base on its own answers" if own else "rise of the general loss"
    if (part := _fraction(learning, plain_learned)) is not None:
        amounts = f"{_with_error(learning)} of {_with_error(plain_learned)} nats per token"
        yield Headline(part, "of what plain fine-tuning learned", amounts, domain)
    else:
        sure = f"fall of the loss on held-out text, {_how_sure(learning)}"
        yield Headline(numbers.nats(learning.nats), "nats per token learned", sure, domain)
    if (part := _fraction(forgetting, plain_lost)) is not None:
        amounts = f"{_with_error(forgetting)} of {_with_error(plain_lost)} nats per token: {what}"
        yield Headline(part, "of what plain fine-tuning lost", amounts, text)
    else:
        lost = numbers.nats(forgetting.nats)
        phrase = "nats per token away from its base" if own else "nats per token forgotten"
        sure = f"{what}, {_how_sure(forgetting)}"
        if own and forgetting.nats is not None:
            percent = f"{numbers.perplexity_percent(forgetting.nats):+.1f} % of perplexity"
            sure = f"{sure}; {percent}"
        yield Headline(lost, phrase, sure, text)
    if contents.budget is not None:
        yield _budget(contents.budget)


def _checked_headline(gate: Gate) -> Headline:
    return Headline(
        f"{gate.count(MET)} of {len(gate.bounds)}",
        "bound met" if len(gate.bounds) == 1 else "bounds met",
        f"{gate.verdict}, {'passed' if gate.passed else 'not passed'}",
        str(gate.tuned),
    )


def _budget(report: BudgetReport) -> Headline:
    """Whether the budget held, with what was found on text that nothing was chosen on."""
    detail = "predicted by the importance file, not measured"
    check = report.check
    if check is not None and check.low is not None and check.high is not None:
        detail = f"between {check.low:.4f} and {check.high:.4f} nats per token"
        if report.budget_nats is not None:
            detail += f"; the budget is {report.budget_nats:.4f}"
    return Headline(str(report.verdict), f"the budget of {report.budget}", detail, "budget")


def _of_plain(contents: Comparison) -> tuple[Change, Change]:
    if contents.plain is None:
        return Change(), Change()
    return contents.plain.learning or Change(), contents.plain.forgetting or Change()


def _fraction(change: Change, of: Change) -> str | None:
    """How much of another change this one is; None where that is not measured or not above 0."""
    if change.nats is None or of.nats is None or of.nats <= 0:
        return None
    return f"{100 * change.nats / of.nats:.0f} %"


def _with_error(change: Change) -> str:
    return numbers.nats(change.nats, change.standard_error)


def _is_divergence(contents: Comparison) -> bool:
    """Whether forgetting is a divergence, on the page of a single run."""
    return any(str(measure.name).startswith("divergence") for measure in contents.measures)


def _how_sure(change: Change) -> str:
    if change.nats is None:
        return "not measured"
    if change.standard_error is None:
        return "one document"
    return f"standard error {change.standard_error:.3f}"


def behaviour_sentences(behaviours: Sequence[BehaviourChange]) -> list[str]:
    """The behaviours that changed beyond the noise, in words, the worse ones first."""
    if not behaviours:
        return []
    changed = [each for each in behaviours if each.beyond_noise]
    if not changed:
        return [f"None of {len(behaviours)} behaviours of its answers changed beyond the noise."]
    changed.sort(key=lambda each: each.verdict != "worse")
    said = [_behaviour_sentence(each) for each in changed[:MOST_SENTENCES]]
    same = len(behaviours) - len(changed)
    return (
        [*said, f"The other {same} behaviours did not change beyond the noise."] if same else said
    )


def _behaviour_sentence(each: BehaviourChange) -> str:
    """'end on their own: 94.0 % of answers before, 61.0 % after (worse).'"""
    verdict = CHANGED.get(each.verdict, each.verdict)
    what = str(each.counts or each.name)
    if each.unit == IN_TOKENS:
        before, after = (
            numbers.MISSING if value is None else shown_tokens(value)
            for value in (each.before, each.after)
        )
        return f"{what}: {before} tokens before, {after} after ({verdict})."
    before, after = numbers.accuracy(each.before), numbers.accuracy(each.after)
    return f"{what}: {before} of answers before, {after} after ({verdict})."
