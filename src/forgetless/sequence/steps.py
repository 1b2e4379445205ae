"""The steps of a sequence, each on top of what the steps before it have learned.

`tune` on several domains and the sequences of `compare` both run on these functions; they differ in
where a step's options come from and in what is measured after it.

    one, two = Path("run/steps/1"), Path("run/steps/2")
    steps = Steps((Step(first, options, one), Step(second, options, two)))
    take(steps, 1)               # tunes on the first domain
    take(steps, 2)               # on the second, with the first one's update merged into the base
    model_after(steps, 2)        # what anybody would load: the base with the sum of both updates

A step is tuned on the base model with every earlier update merged into its weights, in memory:
nothing but adapters lies on the disk. With importance it is held by what held the step before,
consolidated with importance of the domain that was learned there. Where all updates are LoRA, the
model after a step is the base with one plain adapter, their exact sum (model/stack.py); others, and
fully fine-tuned models, are merged one after the other.

    FOLDER/run.json, FOLDER/final/         the step, as `tune` writes it; its adapter is relative to
                                           the model before
    FOLDER/importance.safetensors          what it was held by, from the second step on
    FOLDER/adapter/                        the sum of all updates so far, for the base itself

Whatever is finished is found again, and a recording or a training that was cut off goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from forgetless.files.atomic import discard
from forgetless.files.run_json import Run
from forgetless.files.schema import as_record, read_record
from forgetless.model.adapter_files import CONFIG, checked_adapter
from forgetless.model.precision import load_to_train
from forgetless.model.stack import stack
from forgetless.model.stages import Earlier, LearnedDomain, Stage, merged
from forgetless.options.tune import TuneOptions
from forgetless.sequence.domains import Domain
from forgetless.sequence.importance import consolidate
from forgetless.tune.tune import tune

# The file that a step is held by, in its folder.
IMPORTANCE = "importance.safetensors"


@dataclass(frozen=True)
class Step:
    """One domain that is learned, how, and where.

    `options` are those of `tune` for this step, on the base model. Their `importance` is the file
    that holds what the base knows; what the earlier domains taught is added to it (`held_by`).
    """

    domain: Domain
    options: TuneOptions
    folder: Path


@dataclass(frozen=True)
class Steps:
    """Steps that stand on each other.

    `start` is the adapter of the run that is gone on from, if any, and `before` are the domains
    that it has learned.
    """

    each: tuple[Step, ...]
    start: str | None = None
    before: tuple[Domain, ...] = ()

    def learned_before(self, number: int) -> Domain:
        """The domain that was learned last before step `number`."""
        return self.each[number - 2].domain if number > 1 else self.before[-1]


def take(steps: Steps, number: int) -> Run:
    """Tune step `number` (from 1), unless that is done; what its run.json holds."""
    step = steps.each[number - 1]
    if (step.folder / "run.json").exists():
        return read_record(step.folder / "run.json", Run)
    options = replace(
        step.options,
        importance=held_by(steps, number),
        out=str(step.folder),
        consolidate=None,
        resume=True,
        overwrite=False,
    )
    return as_record(tune(options, earlier=_below(steps, number)), Run)


def held_by(steps: Steps, number: int) -> str | None:
    """The importance file that a step is held by.

    It is the one of its options for the first step, from then on that of the step before,
    consolidated with importance of the domain that was learned there.
    """
    step = steps.each[number - 1]
    first = number == 1
    if step.options.importance is None or (first and not steps.start):
        return step.options.importance
    so_far = step.options.importance if first else held_by(steps, number - 1)
    if so_far is None:
        return None
    path = step.folder / IMPORTANCE
    if path.exists():
        return str(path)
    domain = steps.learned_before(number)
    taught = lambda: model_after(steps, number - 1)
    return consolidate(so_far, domain.train, domain.split, taught, step.options, path)


def model_after(steps: Steps, number: int) -> nn.Module:
    """The base with everything that the first `number` steps have learned in its weights."""
    model: nn.Module = load_to_train(steps.each[0].options)
    for folder in updates(steps, number):
        model = merged(model, folder)
    return model


def updates(steps: Steps, number: int) -> tuple[str, ...]:
    """The folders that lead from the base to the model after `number` steps, to be merged in turn.

    Where all of the updates are LoRA, that is one adapter, written where it is not there yet.
    """
    trained = trained_so_far(steps, number)
    if number == 0 or not all(map(_is_lora, trained)):
        return trained
    step = steps.each[number - 1]
    if not (step.folder / "adapter").is_dir():
        stack(step.options, trained, step.folder / "adapter")
    return (str(step.folder / "adapter"),)


def trained_so_far(steps: Steps, number: int) -> tuple[str, ...]:
    """The folders of what was trained in the first `number` steps, each relative to the last."""
    start = [steps.start] if steps.start else []
    return (*start, *(str(step.folder / "final") for step in steps.each[:number]))


def clear(step: Step, *more: str) -> None:
    """Remove from the folder of a finished step what only an unfinished one needs, and `more`."""
    for name in ("unscaled", "checkpoints", "domain.safetensors", *more):
        discard(step.folder / name)


def _below(steps: Steps, number: int) -> Earlier:
    """What step `number` stands on, and the fraction of a budget that may be spent by its end."""
    stages = []
    if steps.start:
        stages.append(Stage(steps.start, tuple(map(_learned, steps.before))))
    for step in steps.each[: number - 1]:
        stages.append(Stage(str(step.folder / "final"), (_learned(step.domain),)))
    reference = 1 if steps.start else 0
    return Earlier(tuple(stages), reference, number / len(steps.each))


def _learned(domain: Domain) -> LearnedDomain:
    return LearnedDomain(domain.name, domain.held, domain.held_split)


def _is_lora(folder: str) -> bool:
    """Whether a run left a LoRA adapter there: not another kind, and not a whole model."""
    return (Path(folder) / CONFIG).is_file() and checked_adapter(folder)["peft_type"] == "LORA"
