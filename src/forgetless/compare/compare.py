"""compare(): runs what an experiment asks for and has not been run yet, one process or several, and
keeps DIR/compare.json up to date.

    DIR/resolved.yaml       the experiment with all its defaults, valid as EXPERIMENT
    DIR/data/               the parts of every text and domain, carved once (parts.py)
    DIR/base.json           the bare base model on each of them (base.py)
    DIR/importance/         one file per recipe (recipes.py)
    DIR/runs/ID/run.json    one run (job.py, trial.py); ID is a hash of all that decides it, so what
                            is finished is never run again
    DIR/runs/ID/adapter/    its finished adapter
    DIR/sequences/          domains one after another (sequences.py)
    DIR/accuracy.json       multiple-choice questions (accuracy.py)
    DIR/compare.json        the summary (summary.py), all that `forgetless report` reads

A run trains by `tune`, then its finished update is evaluated at every scale on every text. Settings
are chosen on validation parts carved from the training data; the test parts are used once, at the
chosen settings, with fresh seeds. Whatever stops the campaign, at most the run at hand is lost. Out
of memory is a result; another failure is noted and tried again the next time.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from forgetless.compare.accuracy import check_questions, gpus_to_share, score_all, score_base
from forgetless.compare.base import measure_base
from forgetless.compare.choice import choose
from forgetless.compare.experiment import Chosen, Experiment, Trial, final_trials, validation_trials
from forgetless.compare.experiment_file import as_given, read
from forgetless.compare.job import ENDED, Job, job_of
from forgetless.compare.parts import prepare
from forgetless.compare.plan import check_methods, plan_text
from forgetless.compare.processes import in_processes
from forgetless.compare.recipes import Recipe, record_all
from forgetless.compare.samples import answer
from forgetless.compare.sequences import Campaign, run_sequences
from forgetless.compare.summary import ended, summarise
from forgetless.compare.trial import run, was_killed
from forgetless.compare.verdict import progress_line
from forgetless.files.atomic import write_text
from forgetless.files.campaign_json import BaseMeasured
from forgetless.files.compare_json import Comparison, TrialRun
from forgetless.files.lock import only_writer
from forgetless.files.outputs import RESOLVED, claim, local_paths
from forgetless.files.run_json import FAILED
from forgetless.files.schema import plain_of, read_record
from forgetless.files.untrusted import JsonObject
from forgetless.model.fingerprint import files_fingerprint
from forgetless.options.compare import CompareOptions
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve

logger = logging.getLogger("forgetless")
# What a comparison writes in its folder.
COMPARE_WRITES = (
    RESOLVED,
    "data",
    "base.json",
    "importance",
    "runs",
    "sequences",
    "sequences.json",
    "accuracy.json",
    "samples.json",
    "compare.json",
)


def compare(options: CompareOptions) -> JsonObject:
    """Run the experiment in a file, say what came of it, and return the summary.

    Raises OptionError or ValueError for what is wrong with it before anything is trained, and
    ValueError where no run succeeded.
    """
    experiment = read(options.experiment)
    if options.dry_run:
        check_methods(experiment)
        check_questions(experiment)
        print(plan_text(experiment, options.part))
        return {}
    summary = run_experiment(experiment, Path(options.out), part=options.part, jobs=options.jobs)
    print("\n".join(map(str, summary.verdict)))
    check_any_done(summary)
    if failed := sum(run.status == FAILED for run in summary.runs):
        logger.warning("%d runs failed; the same command tries them again", failed)
    return plain_of(summary)


def run_experiment(
    experiment: Experiment, out: Path, *, part: str = "both", jobs: int = 1
) -> Comparison:
    """Everything that is not finished, in `jobs` processes; returns what is in DIR/compare.json.

    `part`: "validation" leaves the test part for later. Raises OptionError or ValueError for what
    is wrong with the experiment before anything is trained.
    """
    check_methods(experiment)
    check_questions(experiment)
    with only_writer(out):
        claim(out, "compare", COMPARE_WRITES, _inputs(experiment))
        experiment = with_base(experiment)
        _write_resolved(experiment, out)
        files = prepare(experiment, out)
        measure_base(experiment, files, out)
        recipes = record_all(experiment, files, out)
        prepared = lambda trials: [job_of(experiment, t, files, recipes, out) for t in trials]
        tested = part != "validation" and bool(experiment.seeds.get("test"))
        every = prepared(validation_trials(experiment))
        _run_waiting(experiment, every, jobs, out, later=_to_test(experiment, out) if tested else 0)
        chosen = choose(experiment, ended(out, _trials(every)))
        if tested:
            final = prepared(final_trials(experiment, chosen))
            _run_waiting(experiment, final, jobs, out, before=every)
            every += final
            if experiment.sequences:
                run_sequences(_campaign(experiment, files, recipes, out), chosen)
        score_all(experiment, every, out, jobs)
        answer(experiment, _standing_for_methods(chosen, every), files, out)
        return summarise(out, _trials(every))


def with_base(experiment: Experiment) -> Experiment:
    """The experiment with what its base is now, which every address says."""
    base = files_fingerprint(resolve(ModelOptions, experiment.model))
    return dataclasses.replace(experiment, base=base)


def _write_resolved(experiment: Experiment, out: Path) -> None:
    write_text(out / RESOLVED, yaml.safe_dump(as_given(experiment), sort_keys=False))


def _inputs(experiment: Experiment) -> dict[str, Path]:
    """The local files and folders that an experiment names."""
    named = [experiment.model["model"], experiment.prompts or "", *experiment.tasks.values()]
    for place in (*experiment.general.values(), *experiment.domains.values()):
        named += place.values()
    return local_paths(dict.fromkeys(map(str, named), ""))


def _run_waiting(
    experiment: Experiment,
    jobs: Sequence[Job],
    processes: int,
    out: Path,
    before: Sequence[Job] = (),
    later: int = 0,
) -> None:
    """Run the jobs that are not finished, in their order, and write the summary after each.

    `later`: how many runs come after these.
    """
    # Two settings may be the same run.
    waiting = list({job.id: job for job in jobs if not job.finished}.values())
    every = _trials((*before, *jobs))
    started = time.perf_counter()
    gpus = gpus_to_share(experiment)
    ending = in_processes(run, waiting, processes, killed=was_killed, gpus=gpus)
    for done, job in enumerate(ending, 1):
        left = len(waiting) - done + later
        summary = summarise(out, every, pending=left)
        seconds = (time.perf_counter() - started) / done * left
        ended_now = read_record(job.folder / "run.json", TrialRun)
        logger.info("%s", progress_line(ended_now, summary, seconds))


def _to_test(experiment: Experiment, out: Path) -> int:
    """How many runs on the test part are still to come, before it is known which settings they
    have.
    """
    seeds = experiment.seeds.get("test", [])
    every = len(experiment.methods) * len(experiment.domains) * len(seeds)
    runs = [read_record(path, TrialRun) for path in out.glob("runs/*/run.json")]
    return max(0, every - sum(run.part == "test" and run.status in ENDED for run in runs))


def _campaign(
    experiment: Experiment, files: Mapping[str, str], recipes: Mapping[str, Recipe], out: Path
) -> Campaign:
    base = read_record(out / "base.json", BaseMeasured).test
    return Campaign(experiment, files, recipes, base, score_base(experiment, out), out)


def _trials(jobs: Iterable[Job]) -> list[tuple[str, Trial]]:
    return [(job.id, job.trial) for job in jobs]


def _standing_for_methods(chosen: Chosen, jobs: Sequence[Job]) -> list[Job]:
    """The runs that stand for their methods: on the test part, or at the chosen settings where
    nothing was tested.
    """
    picked = [
        job
        for job in jobs
        if chosen.get((job.trial.method, job.trial.domain)) == job.trial.settings
    ]
    return [job for job in picked if job.trial.part == "test"] or picked


def check_any_done(comparison: Comparison) -> None:
    """Raise ValueError where no run succeeded."""
    runs = comparison.runs
    if not any(run.status == "done" for run in runs):
        raise ValueError(f"no run of {len(runs)} succeeded; the first error was: {runs[0].error}")
