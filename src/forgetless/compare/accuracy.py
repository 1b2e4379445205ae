"""Accuracy on multiple-choice questions in a comparison: the base model and every finished test
run, on the domain's questions and on those of other tasks.

    domains: {sciq: {data: sciq=train.jsonl, test: sciq=test.jsonl, task: sciq=test.jsonl}}     #
        what was learned
    tasks: {piqa: piqa=test.jsonl}                                                              #
        what may have been lost

    DIR/accuracy.json             of the base
    DIR/runs/ID/accuracy.json     of the whole update of a run

Answers are ranked by likelihood (`evaluation.answers`). Measured from the finished adapters once
the runs are done, so a task that is added to an experiment trains nothing again. Costs a forward
pass over questions times choices, per run and task; how many says `limit: questions` (default: as
`test`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.compare.experiment import Experiment
from forgetless.compare.job import Job
from forgetless.compare.processes import in_processes
from forgetless.data.tasks import load_task
from forgetless.evaluate.accuracy import answers
from forgetless.files.atomic import read_json, write_json
from forgetless.model.adapter_files import load_tuned
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve

logger = logging.getLogger("forgetless")
# What is kept of a task's numbers.
KEPT = ("acc", "acc_stderr", "acc_norm", "questions")


@dataclass(frozen=True)
class _Asked:
    """A run, and the tasks that it is to be scored on: name -> task."""

    job: Job
    wanted: dict[str, str]


def check_questions(experiment: Experiment) -> None:
    """Raise OptionError for tasks that are not ours, ValueError for questions that cannot be read;
    before anything is trained.
    """
    for where, spec in {
        **{
            f"domains: {name}": place["task"]
            for name, place in experiment.domains.items()
            if "task" in place
        },
        **{f"tasks: {name}": spec for name, spec in experiment.tasks.items()},
    }.items():
        try:
            load_task(spec, split=None)
        except ValueError as error:
            raise type(error)(f"{where}: {error}") from None


def score_all(experiment: Experiment, jobs: Sequence[Job], out: Path, processes: int = 1) -> None:
    """Measure what is not measured yet.

    `jobs`: the runs of the campaign; those on the test part (on the validation part, where the
    experiment has no test seeds) that are done are scored, `processes` at a time.
    """
    if not domain_tasks(experiment) and not experiment.tasks:
        return
    score_base(experiment, out)
    # Methods may share a run.
    asked = [_Asked(job, _wanted(job)) for job in {job.id: job for job in jobs}.values()]
    waiting = [one for one in asked if _is_waiting(one) and _has_adapter(one.job)]
    ending = in_processes(
        _score_run, waiting, processes, killed=_was_killed, spread=spread(experiment)
    )
    for done, _ in enumerate(ending, 1):
        logger.info("accuracy of %d of %d runs", done, len(waiting))


def _wanted(job: Job) -> dict[str, str]:
    """The tasks that a run is scored on: the questions of its domain, and the other tasks."""
    own, domain = domain_tasks(job.experiment), job.trial.domain
    return {**({domain: own[domain]} if domain in own else {}), **job.experiment.tasks}


def _is_waiting(asked: _Asked) -> bool:
    job = asked.job
    if job.trial.part != job.experiment.last_part or not asked.wanted:
        return False
    if read_json(job.folder / "run.json")["status"] != "done":
        return False
    return _known(job.folder / "accuracy.json", job.experiment, asked.wanted) is None


def _has_adapter(job: Job) -> bool:
    if (job.folder / "adapter").is_dir():
        return True
    logger.warning(
        "%s on %s, seed %d: its adapter is gone, so its accuracy cannot be measured",
        job.trial.method,
        job.trial.domain,
        job.trial.seed,
    )
    return False


def spread(experiment: Experiment) -> bool:
    """Whether each process may have a GPU of its own: not where the experiment names one."""
    return ":" not in str(experiment.model.get("device") or "")


def domain_tasks(experiment: Experiment) -> dict[str, str]:
    """The multiple-choice questions of the domains that have any: domain -> task."""
    return {
        domain: place["task"] for domain, place in experiment.domains.items() if "task" in place
    }


def score_base(experiment: Experiment, out: Path) -> dict[str, float]:
    """The base model's accuracy on every task, measured once: name -> fraction of right answers."""
    wanted = {**domain_tasks(experiment), **experiment.tasks}
    if not wanted:
        return {}
    found = _known(out / "accuracy.json", experiment, wanted)
    if found is None:
        options = resolve(ModelOptions, experiment.model)
        found = score(load_model(options), load_tokenizer(options), experiment, wanted)
        write_json(out / "accuracy.json", found)
    return {name: task["acc"] for name, task in found["tasks"].items()}


def score_domains(
    experiment: Experiment, model: nn.Module, tokenizer: Any, domains: Sequence[str]
) -> dict[str, float]:
    """The accuracy of one state of a model on those of `domains` that have questions."""
    own = domain_tasks(experiment)
    found = score(
        model, tokenizer, experiment, {domain: own[domain] for domain in domains if domain in own}
    )
    return {name: task["acc"] for name, task in found["tasks"].items()}


def question_limit(experiment: Experiment) -> int | None:
    """How many questions of each task are asked."""
    return experiment.limit.get("questions", experiment.limit.get("test"))


def _score_run(asked: _Asked) -> None:
    job, options, trial = asked.job, asked.job.options, asked.job.trial
    try:
        model = load_tuned(options, job.folder / "adapter", full=options.full)
        scored = score(model, load_tokenizer(options), job.experiment, asked.wanted)
        write_json(job.folder / "accuracy.json", scored)
    except Exception as error:  # one run without an accuracy must not cost the comparison
        logger.warning(
            "%s on %s, seed %d: its accuracy was not measured (%s: %s); the same command tries "
            "again",
            trial.method,
            trial.domain,
            trial.seed,
            type(error).__name__,
            error,
        )


def _was_killed(asked: _Asked) -> None:
    trial = asked.job.trial
    logger.warning(
        "%s on %s: its process was killed, so its accuracy was not measured; the same command "
        "tries again",
        trial.method,
        trial.domain,
    )


def _known(path: Path, experiment: Experiment, wanted: Mapping[str, str]) -> dict[str, Any] | None:
    """What was measured, if it is all that is wanted."""
    found = dict(read_json(path)) if path.exists() else None
    if (
        found is None
        or found["limit"] != question_limit(experiment)
        or found.get("model", experiment.model["model"]) != experiment.model["model"]
    ):
        return None
    return (
        found
        if all(found["tasks"].get(name, {}).get("task") == spec for name, spec in wanted.items())
        else None
    )


def score(
    model: nn.Module, tokenizer: Any, experiment: Experiment, wanted: Mapping[str, str]
) -> dict[str, Any]:
    """What accuracy.json holds of one state of a model; `wanted`: name -> task."""
    limit = question_limit(experiment)
    tasks = {}
    for name, spec in wanted.items():
        task, rows = load_task(spec, split=None)
        measured = answers(model, tokenizer, task, rows[:limit]).numbers
        tasks[name] = {"task": spec, **{key: measured[key] for key in KEPT}}
        if task.per_byte:
            tasks[name] |= {"acc": measured["acc_norm"], "acc_stderr": measured["acc_norm_stderr"]}
    return {"model": experiment.model["model"], "limit": limit, "tasks": tasks}
