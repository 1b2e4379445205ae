"""Accuracy on multiple-choice questions in a comparison: the base model and every finished test
run, on the domain's questions and on those of other tasks.

    domains:                                                        # what was learned
      sciq: {data: sciq=train.jsonl, test: sciq=test.jsonl, task: sciq=test.jsonl}
    tasks: {piqa: piqa=test.jsonl}                                  # what may have been lost

    DIR/accuracy.json             of the base
    DIR/runs/ID/accuracy.json     of the whole update of a run

Answers are ranked by likelihood (evaluate/accuracy.py). They are measured from the finished
adapters once the runs are done, so a task that is added to an experiment trains nothing again. This
costs a forward pass over questions times choices, per run and task. `limit: questions` says how
many questions are asked, and else `limit: test`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.compare.experiment import Experiment
from forgetless.compare.job import Job
from forgetless.compare.processes import in_processes
from forgetless.data.tasks import load_task
from forgetless.evaluate.accuracy import answers
from forgetless.files.campaign_json import Accuracies, TaskAccuracy
from forgetless.files.compare_json import TrialRun
from forgetless.files.schema import read_record, write_record
from forgetless.model.adapter_files import load_tuned
from forgetless.model.loading import load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve

logger = logging.getLogger("forgetless")


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
    waiting = [each for each in asked if _is_waiting(each) and _has_adapter(each.job)]
    gpus = gpus_to_share(experiment)
    ending = in_processes(_score_run, waiting, processes, killed=_was_killed, gpus=gpus)
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
    if read_record(job.folder / "run.json", TrialRun).status != "done":
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


def gpus_to_share(experiment: Experiment) -> int:
    """How many GPUs processes may share out: none where the experiment names one."""
    named = ":" in str(experiment.model.get("device") or "")
    return 0 if named else torch.cuda.device_count()


def domain_tasks(experiment: Experiment) -> dict[str, str]:
    """The multiple-choice questions of the domains that have any: domain -> task."""
    return {
        domain: place["task"] for domain, place in experiment.domains.items() if "task" in place
    }


def score_base(experiment: Experiment, out: Path) -> dict[str, float | None]:
    """The base model's accuracy on every task, measured once: name -> fraction of right answers."""
    wanted = {**domain_tasks(experiment), **experiment.tasks}
    if not wanted:
        return {}
    known = _known(out / "accuracy.json", experiment, wanted)
    if known is None:
        options = resolve(ModelOptions, experiment.model)
        known = score(load_to_train(options), load_tokenizer(options), experiment, wanted)
        write_record(out / "accuracy.json", known)
    return _fractions(known)


def score_domains(
    experiment: Experiment, model: nn.Module, tokenizer: Any, domains: Sequence[str]
) -> dict[str, float | None]:
    """The accuracy of one state of a model on those of `domains` that have questions."""
    own = domain_tasks(experiment)
    wanted = {domain: own[domain] for domain in domains if domain in own}
    known = score(model, tokenizer, experiment, wanted)
    return _fractions(known)


def question_limit(experiment: Experiment) -> int | None:
    """How many questions of each task are asked."""
    return experiment.limit.get("questions", experiment.limit.get("test"))


def _score_run(asked: _Asked) -> None:
    job, options, trial = asked.job, asked.job.options, asked.job.trial
    try:
        model = load_tuned(options, job.folder / "adapter", full=options.full)
        scored = score(model, load_tokenizer(options), job.experiment, asked.wanted)
        write_record(job.folder / "accuracy.json", scored)
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


def _known(path: Path, experiment: Experiment, wanted: Mapping[str, str]) -> Accuracies | None:
    """What was measured, if it is all that is wanted."""
    if not path.exists():
        return None
    known = read_record(path, Accuracies)
    of_this_model = known.model == experiment.model["model"] and known.base == experiment.base
    if known.limit != question_limit(experiment) or not of_this_model:
        return None
    measured = {name: task.task for name, task in known.tasks.items()}
    return known if all(measured.get(name) == spec for name, spec in wanted.items()) else None


def _fractions(known: Accuracies) -> dict[str, float | None]:
    return {name: task.acc for name, task in known.tasks.items()}


def score(
    model: nn.Module, tokenizer: Any, experiment: Experiment, wanted: Mapping[str, str]
) -> Accuracies:
    """What accuracy.json holds of one state of a model; `wanted`: name -> task."""
    limit = question_limit(experiment)
    tasks = {}
    for name, spec in wanted.items():
        task, rows = load_task(spec, split=None)
        asked = rows[:limit]
        measured = answers(model, tokenizer, task, asked).numbers
        shown = "acc_norm" if task.per_byte else "acc"
        tasks[name] = TaskAccuracy(
            task=spec,
            acc=measured[shown],
            acc_stderr=measured[f"{shown}_stderr"],
            acc_norm=measured["acc_norm"],
            questions=len(asked),
        )
    return Accuracies(experiment.model["model"], experiment.base, limit, tasks)
