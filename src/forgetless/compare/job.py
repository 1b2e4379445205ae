"""One run of a comparison as a job: its trial, all that a process needs for it, and its address.

The address is a hash of everything that decides the run, so that what is finished is never run
again, whatever it is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.compare.experiment import RECORDED, Experiment, Trial, identity, tune_options
from forgetless.compare.own import held_by_text, text_of_record
from forgetless.compare.recipes import Recipe
from forgetless.files.compare_json import TrialRun
from forgetless.files.provenance import sha256_file
from forgetless.files.schema import read_record
from forgetless.options.tune import TuneOptions

# How a run may have ended so that it is not tried again.
ENDED = ("done", "out of memory")


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a process needs to run one trial.

    `id` is its address and `folder` DIR/runs/ID; `file_bytes` is the size of its importance file,
    `base` the file with the base's numbers.
    """

    id: str
    folder: Path
    trial: Trial
    options: TuneOptions
    experiment: Experiment
    files: Mapping[str, str]
    file_bytes: int | None
    base: str

    @property
    def finished(self) -> bool:
        """Whether it has ended, and is not to be tried again."""
        path = self.folder / "run.json"
        return path.exists() and read_record(path, TrialRun).status in ENDED


def job_of(
    experiment: Experiment,
    trial: Trial,
    files: Mapping[str, str],
    recipes: Mapping[str, Recipe],
    out: Path,
) -> Job:
    """The job of a trial below `out`."""
    recipe = recipes.get(str(trial.settings.get("importance")))
    options = tune_options(
        experiment,
        trial.settings,
        data=files[f"domain/{trial.domain}/train"],
        replay=text_of_record(experiment, files),
        importance=recipe.path if recipe else None,
        out="",
        seed=trial.seed,
    )
    address = _run_address(experiment, trial, files, recipe.mark if recipe else None, options)
    folder = out / "runs" / address
    return Job(
        address,
        folder,
        trial,
        dataclasses.replace(options, out=str(folder / "work"), overwrite=True),
        experiment,
        files,
        recipe.bytes if recipe else None,
        str(out / "base.json"),
    )


def _run_address(
    experiment: Experiment,
    trial: Trial,
    files: Mapping[str, str],
    mark: Any,
    options: TuneOptions,
) -> str:
    """A hash of the options, of what the files hold, and of how the run is measured."""
    texts = [held_by_text(experiment, files, name, trial.part) for name in experiment.general]
    more = [
        experiment.base,
        sha256_file(files[f"domain/{trial.domain}/train"]),
        mark,
        _replayed(experiment, trial, files),
        [*texts, sha256_file(files[f"domain/{trial.domain}/{trial.part}"])],
        trial.part,
        list(experiment.scales),
        experiment.limit.get(trial.part),
        experiment.characters,
    ]
    return identity(options, more=more)


def _replayed(experiment: Experiment, trial: Trial, files: Mapping[str, str]) -> list[str]:
    word = trial.settings.get("replay")
    if word is None:
        return []
    if word == RECORDED:
        return [held_by_text(experiment, files, experiment.recorded, "record")]
    return [sha256_file(word) if Path(word).is_file() else word]
