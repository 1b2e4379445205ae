"""A single run as a comparison of one, which is what a report shows."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgetless.files.behaviours_json import Conversation
from forgetless.files.compare_json import (
    ComparedMethod,
    ComparedSequence,
    Comparison,
    DomainBefore,
    DomainData,
    GeneralText,
    Measure,
    Sample,
    TextBefore,
    TrialPoint,
    TrialRun,
)
from forgetless.files.measured_json import Change, Interval, Loss, Measured, Scores
from forgetless.files.run_json import Run, SequenceMatrix, TrainedData
from forgetless.files.schema import GENERAL
from forgetless.report import numbers
from forgetless.report.budget import kept_in_words
from forgetless.report.gate import gate_sentences
from forgetless.report.run_headlines import behaviour_sentences

# The options of a run that stand beside it in a table.
SHOWN_SETTINGS = ("learning_rate", "strength", "rank")
# The unit of an accuracy among the measures of a run.
OF_ONE = "share"


def as_comparison(run: Run, path: Path) -> Comparison:
    """The run whose run.json lies at `path`, as a comparison of kind "run"."""
    options = run.configuration
    domain = _stem(options.get("eval_data") or options.get("data")) or "domain"
    text = _stem(options.get("general")) or GENERAL
    before = run.before or Measured()
    data = run.data or TrainedData()
    return Comparison(
        kind="run",
        title=path.parent.resolve().name,
        model=options.get("model") or "",
        created=_written_at(path),
        environment=run.environment,
        experiment=options,
        domains=[DomainData(domain, data.rows, data.rows_trained, _domain_before(before.domain))],
        texts=[GeneralText(text, "recorded", before=_text_before(before.general))],
        methods=[ComparedMethod(_method_name(run))],
        runs=[_trial(run, path.parent.name, domain, text)],
        measures=list(run_measures(run)),
        verdict=list(run_sentences(run, domain, text)),
        sequences=None if run.sequence is None else [_compared_sequence(run, run.sequence, text)],
        budget=run.budget,
        gate=run.gate,
        samples=[_sample(each) for each in run.conversations or []],
        behaviours=run.behaviours or [],
        not_judged=run.not_judged or [],
        divergence_by_kind=run.divergence_by_kind or [],
    )


def _sample(each: Conversation) -> Sample:
    """A conversation with why it is shown."""
    why = f"{each.chosen or 'shown'}: {numbers.nats(each.nats)} nats per token ({each.kind})"
    return Sample(why, each.prompt, outputs={"base": each.before, "after": each.after})


def _method_name(run: Run) -> str:
    """The methods of a run in one name; of a verb that knows none, "run"."""
    return "run" if run.method is None else "+".join(run.method) or "plain"


def _trial(run: Run, name: str, domain: str, text: str) -> TrialRun:
    options = run.configuration
    point = TrialPoint(
        scale=options.get("scale") or 1.0,
        learning=change_of(run.learning),
        forgetting={text: change_of(run.forgetting)},
    )
    return TrialRun(
        id=name,
        method=_method_name(run),
        domain=domain,
        part="test",
        seed=options.get("seed"),
        status="done",
        chosen=True,
        settings={key: options[key] for key in SHOWN_SETTINGS if key in options},
        points=[point],
        energy=run.energy,
        seconds=run.train_seconds,
        trainable_parameters=run.trainable_parameters,
        peak_memory_bytes=run.peak_memory_bytes,
        log=run.log,
        moved=run.moved,
    )


def change_of(interval: Interval | None) -> Change | None:
    """A change without its interval."""
    return None if interval is None else Change(interval.nats, interval.standard_error)


def _text_before(loss: Loss | None) -> TextBefore | None:
    return None if loss is None else TextBefore(loss.nats, loss.standard_error, loss.perplexity)


def _domain_before(loss: Loss | None) -> DomainBefore | None:
    return None if loss is None else DomainBefore(loss.nats, loss.standard_error, loss.perplexity)


def _compared_sequence(run: Run, sequence: SequenceMatrix, text: str) -> ComparedSequence:
    """The matrix of a run on several domains, as a comparison has it."""
    columns = [
        sequence.accuracy_domains.index(name) if name in sequence.accuracy_domains else None
        for name in sequence.domains
    ]
    accuracy = [
        [None if at is None or at >= len(row) else row[at] for at in columns]
        for row in sequence.accuracy or []
    ]
    general = {text: [change.nats for change in sequence.general]} if sequence.general else {}
    return ComparedSequence(
        name="of the run",
        method=_method_name(run),
        seed=run.configuration.get("seed"),
        domains=list(sequence.domains),
        rows=sequence.rows or None,
        matrix=sequence.matrix,
        accuracy=accuracy or None,
        accuracy_transfer=sequence.accuracy_transfer,
        general=dict(general),
        average=sequence.average,
        backward_transfer=sequence.backward_transfer,
        forward_transfer=sequence.forward_transfer,
    )


def _written_at(path: Path) -> str:
    written = datetime.datetime.fromtimestamp(path.stat().st_mtime, tz=datetime.UTC)
    return written.isoformat(timespec="minutes")


def _stem(name: Any) -> str:
    """The last part of a path or Hub name, without the ending of a file."""
    return Path(str(name)).stem if name else ""


def run_measures(run: Run) -> Iterator[Measure]:
    """What was measured before and after; the standard error is that of the change for losses, and
    of the value after for accuracies.
    """
    before, after = run.before or Measured(), run.after or Measured()
    every = (
        *_of_own(before.own, after.own),
        *_of_losses("general", before.general, after.general, run.general or run.forgetting),
        *_of_losses("domain", before.domain, after.domain, run.learning),
        *(
            measure
            for name, scores in before.tasks.items()
            for measure in _of_task(name, scores or Scores(), after.tasks.get(name) or Scores())
        ),
    )
    yield from (each for each in every if each.before is not None or each.after is not None)


def _of_losses(
    name: str, before: Loss | None, after: Loss | None, change: Interval | None
) -> tuple[Measure, Measure]:
    a, b = before or Loss(), after or Loss()
    error = None if change is None else change.standard_error
    return (
        Measure(f"{name} loss", "nats per token", a.nats, b.nats, error),
        Measure(f"{name} perplexity", "", a.perplexity, b.perplexity),
    )


def _of_own(before: Loss | None, after: Loss | None) -> Iterator[Measure]:
    if before is not None and after is not None:
        error = after.standard_error
        yield Measure("divergence on own answers", "nats per token", before.nats, after.nats, error)


def _of_task(name: str, before: Scores, after: Scores) -> Iterator[Measure]:
    a, b = before.answer_loss or Loss(), after.answer_loss or Loss()
    yield Measure(f"{name} answer loss", "nats per token", a.nats, b.nats)
    for metric in before.metrics:
        yield Measure(
            f"{name} {metric}",
            OF_ONE,
            before.numbers.get(metric),
            after.numbers.get(metric),
            after.numbers.get(f"{metric}_stderr"),
        )


def run_sentences(run: Run, domain: str, text: str) -> Iterator[str]:
    """What a single run learned and lost, in words; of one that was checked, its verdicts."""
    if run.gate is not None:
        yield from reversed(gate_sentences(run.gate))
        return
    if run.sequence is not None and run.sequence.matrix:
        yield _learned_in_turn(run.sequence)
    else:
        yield _learning_sentence(run.learning, domain)
    if run.forgetting is None or run.forgetting.nats is None:
        yield "What was forgotten was not measured: --general gives held-out general text."
    else:
        lost = numbers.nats(run.forgetting.nats, run.forgetting.standard_error)
        if run.forgetting.diverged:
            yield f"On the base's own answers ({text}) the model moved by {lost} nats per token."
        else:
            yield f"On {text} the loss rose by {lost} nats per token."
    if isinstance(run.verdict, str):
        yield kept_in_words(run)
    yield from behaviour_sentences(run.behaviours or [])


def _learning_sentence(learning: Interval | None, domain: str) -> str:
    if learning is None or learning.nats is None:
        return "What was learned was not measured: --eval-data gives held-out domain data."
    learned = numbers.nats(learning.nats, learning.standard_error)
    return f"On held-out {domain} the loss fell by {learned} nats per token."


def _learned_in_turn(sequence: SequenceMatrix) -> str:
    ends = zip(sequence.domains, sequence.matrix[0], sequence.matrix[-1], strict=False)
    falls = ", ".join(
        f"{name} {numbers.nats(before - after)}"
        for name, before, after in ends
        if before is not None and after is not None
    )
    return f"After all domains the loss had fallen by, in nats per token: {falls}."
