"""From finished runs to one table: DIR/compare.json, all that a report needs.

It reads files only, and needs no model and no torch.

For each domain and general text: the points of every method (mean over seeds; each setting and
scale is a point), forgetting at equal learning, the area under the frontier, the noise floor, the
differences to plain fine-tuning, and a verdict in plain sentences. Numbers are of the test parts
where they were run, of the validation parts until then (said so).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forgetless.compare.choice import choose
from forgetless.compare.domain import compare_domain
from forgetless.compare.experiment import Chosen, Experiment, Trial
from forgetless.compare.experiment_file import read_back
from forgetless.compare.verdict import verdict
from forgetless.files.atomic import read_json
from forgetless.files.campaign_json import Accuracies, BaseMeasured, TaskAccuracy
from forgetless.files.compare_json import (
    ComparedMethod,
    ComparedSequence,
    Comparison,
    DomainBefore,
    DomainData,
    GeneralText,
    ImportanceFile,
    Progress,
    Sample,
    Score,
    TextBefore,
    TrialPoint,
    TrialRun,
)
from forgetless.files.measured_json import DIVERGENCE
from forgetless.files.outputs import RESOLVED
from forgetless.files.schema import T, from_json, read_record, write_record
from forgetless.files.untrusted import JsonObject

# The file that says which importance files are the experiment's as it is now: label of a recipe ->
# the file that describes its importance file.
CURRENT = "current.json"


def ended(out: Path, trials: Sequence[tuple[str, Trial]]) -> list[TrialRun]:
    """What the runs of these (ID, trial) left below `out`, those that have not ended left out.

    Method and settings are the trial's: an ID does not depend on labels, so methods may share a
    run, and it outlives another label.
    """
    runs = []
    each_once = {(run, repr(trial)): (run, trial) for run, trial in trials}
    for run, trial in each_once.values():
        path = out / "runs" / run / "run.json"
        if path.exists():
            runs.append(replace(read_record(path, TrialRun), **dataclasses.asdict(trial)))
    return runs


def summarise(out: Path, trials: Sequence[tuple[str, Trial]], *, pending: int = 0) -> Comparison:
    """Read the runs of these (ID, trial) below `out`, write out/compare.json and return it.

    Runs that are not finished are left out.
    """
    experiment = read_experiment_back(out)
    base = read_record(out / "base.json", BaseMeasured)
    scored = out / "accuracy.json"
    accuracy = read_record(scored, Accuracies) if scored.exists() else None
    runs = ended(out, trials)
    chosen = choose(experiment, runs)
    runs = [_with_accuracy(run, out, accuracy) for run in runs]
    runs = [
        replace(run, chosen=chosen.get((run.method, str(run.domain))) == run.settings)
        for run in runs
    ]
    comparison = Comparison(
        format=1,
        title=experiment.title,
        model=experiment.model["model"],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=base.environment,
        experiment=(out / RESOLVED).read_text(encoding="utf-8"),
        settings=_settings(experiment),
        progress=_progress(runs, pending),
        reference=experiment.reference,
        texts=list(_texts(experiment, base)),
        domains=list(_domains(experiment, base, accuracy)),
        methods=list(_methods(experiment, chosen)),
        runs=runs,
        importance=_importance(out, runs),
        samples=_records(out / "samples.json", Sample),
        sequences=_sequences(experiment, out),
    )
    for domain in experiment.domains:
        _put_in(comparison, experiment, domain)
    comparison = replace(comparison, verdict=[*verdict(experiment, comparison)])
    write_record(out / "compare.json", comparison)
    return comparison


def _put_in(comparison: Comparison, experiment: Experiment, domain: str) -> None:
    """Put what the runs on a domain say into the comparison."""
    runs = [run for run in comparison.runs if run.domain == domain]
    compared = compare_domain(experiment, runs, domain)
    comparison.frontier[domain] = {text: {**each} for text, each in compared.frontier.items()}
    comparison.equal_learning[domain] = {**compared.equal_learning}
    if compared.noise is not None:
        comparison.noise[domain] = compared.noise
    comparison.differences.extend(compared.differences)


def _sequences(experiment: Experiment, out: Path) -> list[ComparedSequence] | None:
    if not experiment.sequences:
        return None
    return _records(out / "sequences.json", ComparedSequence) or None


def _records(path: Path, kind: type[T]) -> list[T]:
    """A file that holds a list; nothing where it is not there."""
    return [
        from_json(each, kind, f"{path}[{number}]") for number, each in enumerate(_read_or(path, []))
    ]


def _read_or(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _settings(experiment: Experiment) -> JsonObject:
    """What all runs share."""
    return {
        **{key: experiment.training.get(key) for key in ("max_steps", "batch_size", "length")},
        "seeds": experiment.seeds,
        "shares": list(experiment.shares),
        "scales": [*experiment.scales, 1.0],
        "trials": experiment.trials,
    }


def _progress(runs: Sequence[TrialRun], pending: int) -> Progress:
    own = list({run.id: run for run in runs}.values())  # methods may share a run
    return Progress(
        done=sum(run.status == "done" for run in own),
        of=len(own) + pending,
        failed=sum(run.status != "done" for run in own),
        seconds=sum(run.wall_seconds or 0.0 for run in own),
    )


def _importance(out: Path, runs: Sequence[TrialRun]) -> list[ImportanceFile]:
    """The importance files of the experiment as it is now; those of recipes that were changed since
    lie there too.
    """
    names = _read_or(out / "importance" / CURRENT, {}).values()
    files = [out / "importance" / name for name in names]
    recorded = [from_json(read_json(path), ImportanceFile, str(path)) for path in files]
    return [_with_coefficients(each, runs) for each in recorded]


def _with_accuracy(run: TrialRun, out: Path, base: Accuracies | None) -> TrialRun:
    """The run with what was measured in its point of the whole update:

    `accuracy` of its domain, `accuracy_general` of the other tasks.
    """
    path = out / "runs" / str(run.id) / "accuracy.json"
    if base is None or not path.exists():
        return run
    scores = _scores(base.tasks, read_record(path, Accuracies).tasks)
    return replace(run, points=[_scored(point, run.domain, scores) for point in run.points])


def _scores(
    before: Mapping[str, TaskAccuracy], after: Mapping[str, TaskAccuracy]
) -> dict[str, Score]:
    """The accuracy on each task that was measured before and after."""
    scores = {}
    for name, measured in after.items():
        if name in before:
            scores[name] = Score(
                before=before[name].acc,
                after=measured.acc,
                standard_error=measured.acc_stderr,
                questions=measured.questions,
            )
    return scores


def _scored(point: TrialPoint, domain: Any, scores: Mapping[str, Score]) -> TrialPoint:
    if point.scale != 1.0:
        return point
    general: dict[str, Score | None] = {
        name: score for name, score in scores.items() if name != domain
    }
    return replace(point, accuracy=scores.get(domain), accuracy_general=general or None)


def _with_coefficients(recorded: ImportanceFile, runs: Sequence[TrialRun]) -> ImportanceFile:
    """The importance file with c_l in its weights: those of a run that was held by it."""
    by_it = (run for run in runs if run.settings.get("importance") == recorded.name and run.moved)
    held = next(by_it, None)
    moved = held.moved if held and held.moved else []
    known = {row.weight: row.coefficient for row in moved}
    weights = [replace(each, coefficient=known.get(each.name)) for each in recorded.weights]
    return replace(recorded, weights=weights)


def read_experiment_back(out: Path) -> Experiment:
    """The experiment whose runs lie in `out`, as it was resolved."""
    return read_back(out / RESOLVED)


def _texts(experiment: Experiment, base: BaseMeasured) -> Iterator[GeneralText]:
    for name in experiment.general:
        loss = base.test.general[name]
        before = None
        if not experiment.own(name):
            before = TextBefore(loss.nats, loss.standard_error, loss.perplexity)
        yield GeneralText(
            name=name,
            kind="recorded" if name == experiment.recorded else "other",
            documents=loss.documents,
            tokens=loss.tokens,
            before=before,
            of=DIVERGENCE if experiment.own(name) else None,
        )


def _domains(
    experiment: Experiment, base: BaseMeasured, accuracy: Accuracies | None
) -> Iterator[DomainData]:
    known = accuracy.tasks if accuracy else {}
    for name in experiment.domains:
        loss = base.test.domains[name]
        yield DomainData(
            name=name,
            rows=loss.documents,
            rows_trained=base.rows_trained[name],
            before=DomainBefore(
                nats=loss.nats,
                standard_error=loss.standard_error,
                accuracy=known[name].acc if name in known else None,
            ),
        )


def _methods(experiment: Experiment, chosen: Chosen) -> Iterator[ComparedMethod]:
    for label, method in experiment.methods.items():
        mine = {domain: settings for (name, domain), settings in chosen.items() if name == label}
        yield ComparedMethod(
            name=label,
            label=label,
            family=method.family,
            needs=method.needs(experiment.general[experiment.recorded]["text"]),
            trials=len(method.settings()),
            chosen=mine,
        )
