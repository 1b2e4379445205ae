"""Domains one after another, by every method and with every test seed of an experiment.

The steps are those of `tune` on several domains (sequence/steps.py). A method is tuned at the
settings chosen for it on each domain, and every domain and general text is measured on the test
parts after each step.

    DIR/sequences/NAME/METHOD-SEED/1-DOMAIN/step.json    the losses and accuracies after a step
    DIR/sequences/NAME/METHOD-SEED/1-DOMAIN/final/       its adapter, relative to the model before
    DIR/sequences/NAME/METHOD-SEED/2-DOMAIN/adapter/     of the last step: all of them as one
    DIR/sequences.json                                   every sequence: losses, accuracies of the
                                                         domains with questions, transfer

From the second step on, what must not be lost are the general text and the domains before:
importance is consolidated as `tune` does it, and `replay: recorded` is the general text and the
rows of the domains before. A method that asks for earlier adapters gets those of the steps before.
A step's address is a hash of all
that decides it and of the step before: what is finished is not run again, and what was cut off goes
on. A step costs a training, a recording with importance, and an evaluation of everything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.compare.accuracy import domain_tasks, question_limit, score_domains
from forgetless.compare.base import losses_on
from forgetless.compare.experiment import (
    RECORDED,
    Chosen,
    Experiment,
    SequenceSpec,
    identity,
    tune_options,
)
from forgetless.compare.keep import text_to_keep
from forgetless.compare.own import asked, held_by_text, own_of_base
from forgetless.compare.recipes import Recipe
from forgetless.evaluate.losses import TextLoss
from forgetless.files.atomic import discard
from forgetless.files.campaign_json import PartLosses, StepMeasured
from forgetless.files.compare_json import ComparedSequence
from forgetless.files.provenance import sha256_file
from forgetless.files.run_json import Transfer
from forgetless.files.schema import read_record, write_record
from forgetless.model.loading import load_tokenizer
from forgetless.options.methods import METHODS, method_names
from forgetless.options.option import Given
from forgetless.sequence.domains import Domain
from forgetless.sequence.steps import Step, Steps, clear, model_after, take
from forgetless.sequence.transfer import of_accuracy, transfer

logger = logging.getLogger("forgetless")


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What every sequence shares: the experiment, its files and recipes, and the base's numbers on
    the test parts.

    `accuracy` is the base's, of each domain with questions.
    """

    experiment: Experiment
    files: Mapping[str, str]
    recipes: Mapping[str, Recipe]
    base: PartLosses
    accuracy: Mapping[str, float | None]
    out: Path

    def recipe(self, settings: Given) -> Recipe | None:
        """The importance file that settings name, if any."""
        return self.recipes.get(str(settings.get("importance")))


@dataclasses.dataclass(frozen=True)
class Course:
    """One method on its way through one sequence, with one seed."""

    name: str
    spec: SequenceSpec
    method: str
    seed: int
    place: Path

    def __str__(self) -> str:
        return f"{self.name}, {self.method}, seed {self.seed}"


def run_sequences(campaign: Campaign, chosen: Chosen) -> list[ComparedSequence]:
    """Run every sequence that is not finished, one after another; writes and returns what is in
    DIR/sequences.json.
    """
    results: list[ComparedSequence] = []
    for course in _courses(campaign):
        result = _run_course(campaign, course, chosen)
        results.append(result)
        write_record(campaign.out / "sequences.json", results)
        logger.info("sequence %s: %s", course, result.error or _told(result))
    return results


def _courses(campaign: Campaign) -> Iterator[Course]:
    for name, spec in campaign.experiment.sequences.items():
        for method in spec.methods:
            for seed in campaign.experiment.seeds["test"]:
                place = campaign.out / "sequences" / name / f"{method}-{seed}"
                yield Course(name, spec, method, seed, place)


def _told(result: ComparedSequence) -> str:
    numbers = {"average": result.average, "backward transfer": result.backward_transfer}
    return ", ".join(f"{key} {value:.3f}" for key, value in numbers.items() if value is not None)


def _run_course(campaign: Campaign, course: Course, chosen: Chosen) -> ComparedSequence:
    """One method through one sequence, as compare.json has it; a failure ends it and is told."""
    rows: list[StepMeasured] = []
    error = None
    try:
        domains = course.spec.domains
        settings = [course.spec.settings(course.method, domain, chosen) for domain in domains]
        keep = [_to_keep(campaign, course, *each) for each in enumerate(settings, 1)]
        steps = _steps(campaign, course, settings, keep)
        address = ""
        for number, given in enumerate(settings, 1):
            address = _step_address(campaign, steps, number, given, keep[number - 1], address)
            rows.append(_taken(campaign, steps, number, given, address))
    except Exception as failure:  # a result, as a failed run is
        logger.warning("sequence %s: %s", course, failure)
        error = f"{type(failure).__name__}: {failure}"
    return _result(campaign, course, rows, error)


def _result(
    campaign: Campaign, course: Course, rows: Sequence[StepMeasured], error: str | None
) -> ComparedSequence:
    domains = course.spec.domains
    losses = [campaign.base.domains, *(row.domains or {} for row in rows)]
    matrix: Any = [[row[domain].nats for domain in domains] for row in losses]
    rises: dict[str, list[float | None] | None] = {}
    for text in campaign.experiment.general:
        before = TextLoss.of(campaign.base.general[text])
        rises[text] = [before.rise(TextLoss.of(row.general[text])).nats for row in rows]
    total = Transfer(**transfer(matrix))
    accuracy = [campaign.accuracy, *(row.accuracy for row in rows)]
    asked = [number for number, domain in enumerate(domains, 1) if domain in accuracy[0]]
    return ComparedSequence(
        name=course.name,
        method=course.method,
        seed=course.seed,
        domains=list(domains),
        matrix=matrix,
        accuracy=[[row.get(domain) for domain in domains] for row in accuracy] if asked else None,
        accuracy_transfer=_accuracy_transfer(accuracy, domains, asked) if asked else None,
        general=rises,
        error=error,
        average=total.average,
        backward_transfer=total.backward_transfer,
        forward_transfer=total.forward_transfer,
    )


def _accuracy_transfer(
    accuracy: Sequence[Mapping[str, float | None]], domains: Sequence[str], asked: Sequence[int]
) -> Transfer:
    """The transfer of accuracies over the domains with questions; `asked` are their numbers."""
    known: Any = [[row[domains[number - 1]] for number in asked] for row in accuracy]
    return Transfer(**of_accuracy(known, asked, steps=len(domains)))


def _steps(
    campaign: Campaign,
    course: Course,
    settings: Sequence[Given],
    keep: Sequence[str],
) -> Steps:
    """The steps as the engine takes them.

    Raises ValueError where the settings chosen are held by different kinds of importance.
    """
    _check_one_kind(settings)
    each: list[Step] = []
    for number, name in enumerate(course.spec.domains, 1):
        file = f"domain/{name}"
        domain = Domain(name, campaign.files[f"{file}/train"], campaign.files[f"{file}/validation"])
        folder = course.place / f"{number}-{name}"
        given = _with_earlier(settings[number - 1], each)
        recipe = campaign.recipe(given)
        options = tune_options(
            campaign.experiment,
            given,
            data=domain.train,
            replay=keep[number - 1],
            importance=recipe.path if recipe else None,
            out=str(folder),
            seed=course.seed,
        )
        # Only the first step may start from the recorded adapter.
        anchor = "base" if each and options.anchor == "recorded" else options.anchor
        options = dataclasses.replace(options, anchor=anchor, resume=True)
        each.append(Step(domain, options, folder))
    return Steps(tuple(each))


def _check_one_kind(settings: Sequence[Given]) -> None:
    recipes = [given.get("importance") for given in settings]
    for before, recipe in itertools.pairwise(recipes):
        if recipe and recipe != before:
            raise ValueError(
                f"the importance chosen is '{recipe}' after '{before}' for the "
                "domain before: a sequence adds one kind up; lay "
                "`importance` over the method in `sequences`"
            )


def _with_earlier(settings: Given, before: Sequence[Step]) -> Given:
    """The settings with the earlier adapters for a method that asks for them; without it where
    there are none, and then with no option of its own.
    """
    names = method_names(settings["method"])
    asking = [name for name in names if name in METHODS and METHODS[name].needs_earlier]
    if not asking:
        return settings
    if before:
        return {**settings, "earlier": ",".join(str(step.folder / "final") for step in before)}
    others = ",".join(name for name in names if name not in asking) or "plain"
    unread = {option for name in asking for option in METHODS[name].reads}
    given = {**settings, "method": others}
    return {option: value for option, value in given.items() if option not in unread}


def _to_keep(campaign: Campaign, course: Course, number: int, settings: Given) -> str:
    """The text that must not be lost at a step."""
    return text_to_keep(
        campaign.experiment,
        campaign.files,
        course.spec.domains[: number - 1],
        course.place / f"keep-{number}.jsonl",
        replayed=settings.get("replay") == RECORDED,
    )


def _step_address(
    campaign: Campaign,
    steps: Steps,
    number: int,
    settings: Given,
    text: str,
    before: str,
) -> str:
    """A hash of all that decides a step and of the step before it; the model that it stands on and
    the earlier adapters follow from that.
    """
    experiment = campaign.experiment
    step, recipe = steps.each[number - 1], campaign.recipe(settings)
    domains = [each.domain.name for each in steps.each]
    texts = [held_by_text(experiment, campaign.files, name, "test") for name in experiment.general]
    held = [campaign.files[f"domain/{name}/test"] for name in domains]
    questions = {name: task for name, task in domain_tasks(experiment).items() if name in domains}
    more = [
        "step",
        experiment.base,
        before,
        recipe.mark if recipe else None,
        _mark_of_kept(experiment, text),
        [sha256_file(step.domain.train), *texts, *(sha256_file(path) for path in held)],
        experiment.limit.get("test"),
        experiment.characters,
        *([questions, question_limit(experiment)] if questions else []),
    ]
    return identity(dataclasses.replace(step.options, earlier=None), more=more)


def _mark_of_kept(experiment: Experiment, text: str) -> Any:
    """All that decides the text that must not be lost: a file, or what the base says itself."""
    own = experiment.own(experiment.recorded)
    return asked(own) if own and text == own.kind else sha256_file(text)


def _taken(
    campaign: Campaign, steps: Steps, number: int, settings: Given, address: str
) -> StepMeasured:
    """What was measured after a step, which is taken first where it is not finished.

    step.json says from the start whose the folder is; the numbers come into it last.
    """
    step = steps.each[number - 1]
    path = step.folder / "step.json"
    if not path.exists() or read_record(path, StepMeasured).id != address:
        discard(step.folder)
        step.folder.mkdir(parents=True)
        write_record(path, StepMeasured(address))
    if not read_record(path, StepMeasured).done:
        with _said_into(step.folder / "log.txt"):
            write_record(path, _measured_step(campaign, steps, number, settings, address))
    clear(step)
    if number > 1:
        discard(steps.each[number - 2].folder / "adapter")
    return read_record(path, StepMeasured)


def _measured_step(
    campaign: Campaign, steps: Steps, number: int, settings: Given, address: str
) -> StepMeasured:
    """Take a step; the losses and accuracies of the model after it."""
    run = take(steps, number)
    domains = [step.domain.name for step in steps.each]
    tokenizer = load_tokenizer(steps.each[0].options)
    texts = campaign.experiment.general
    own = own_of_base(campaign.experiment, steps.each[0].options, tokenizer, "test", texts)
    # Under the adapter of a later step lies what the steps before have made of the base.
    own = {name: paired.by_stored() for name, paired in own.items()}
    model = model_after(steps, number)
    losses = losses_on(
        campaign.experiment, model, tokenizer, campaign.files, "test", domains, own=own
    )
    return StepMeasured(
        id=address,
        settings={**settings},
        energy=run.energy,
        seconds=run.train_seconds,
        general=losses.general,
        domains=losses.domains,
        accuracy=score_domains(campaign.experiment, model, tokenizer, domains),
    )


@contextlib.contextmanager
def _said_into(path: Path) -> Iterator[None]:
    """What is printed goes into a file."""
    with (
        open(path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
