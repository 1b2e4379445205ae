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
rows of the domains before. `o-lora` gets the earlier adapters. A step's address is a hash of all
that decides it and of the step before: what is finished is not run again, and what was cut off goes
on. A step costs a training, a recording with importance, and an evaluation of everything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.compare.accuracy import domain_tasks, question_limit, score_domains
from forgetless.compare.base import losses_on
from forgetless.compare.experiment import Experiment, SequenceSpec, identity, tune_options
from forgetless.data.documents import load_documents
from forgetless.data.domain import load_training_data, row_text
from forgetless.evaluate.losses import TextLoss
from forgetless.files.atomic import discard, read_json, write_json, write_text
from forgetless.files.provenance import sha256_file
from forgetless.model.loading import load_tokenizer
from forgetless.sequence.domains import Domain
from forgetless.sequence.steps import Step, Steps, clear, model_after, take
from forgetless.sequence.transfer import of_accuracy, transfer

logger = logging.getLogger("forgetless")
Chosen = Mapping[tuple[str, str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What every sequence shares: the experiment, its files and recipes, and the base's numbers on
    the test parts.

    `accuracy` is the base's, of each domain with questions.
    """

    experiment: Experiment
    files: Mapping[str, str]
    recipes: Mapping[str, dict[str, Any]]
    base: Mapping[str, Any]
    accuracy: Mapping[str, float]
    out: Path


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


def run_sequences(campaign: Campaign, chosen: Chosen) -> list[dict[str, Any]]:
    """Run every sequence that is not finished, one after another; writes and returns what is in
    DIR/sequences.json.
    """
    results: list[dict[str, Any]] = []
    for course in _courses(campaign):
        result = _run_one(campaign, course, chosen)
        results.append(result)
        write_json(campaign.out / "sequences.json", results)
        logger.info("sequence %s: %s", course, result["error"] or _told(result))
    return results


def _courses(campaign: Campaign) -> Iterator[Course]:
    for name, spec in campaign.experiment.sequences.items():
        for method in spec.methods:
            for seed in campaign.experiment.seeds["test"]:
                place = campaign.out / "sequences" / name / f"{method}-{seed}"
                yield Course(name, spec, method, seed, place)


def _told(result: Mapping[str, Any]) -> str:
    numbers = {key: result[key] for key in ("average", "backward_transfer")}
    return ", ".join(
        f"{key.replace('_', ' ')} {value:.3f}"
        for key, value in numbers.items()
        if value is not None
    )


def _run_one(campaign: Campaign, course: Course, chosen: Chosen) -> dict[str, Any]:
    """One method through one sequence, as compare.json has it; a failure ends it and is told."""
    rows: list[dict[str, Any]] = []
    error = None
    try:
        domains = course.spec.domains
        settings = [course.spec.settings(course.method, domain, chosen) for domain in domains]
        keep = [_to_keep(campaign, course, number) for number in range(1, len(domains) + 1)]
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
    campaign: Campaign, course: Course, rows: Sequence[Mapping[str, Any]], error: str | None
) -> dict[str, Any]:
    domains = course.spec.domains
    base = {"domains": campaign.base["domains"], "accuracy": campaign.accuracy}
    every = [base, *rows]
    matrix = [[row["domains"][domain]["nats"] for domain in domains] for row in every]
    rises = {}
    for text in campaign.experiment.general:
        before = TextLoss.read(campaign.base["general"][text])
        rises[text] = [before.rise(TextLoss.read(row["general"][text])).nats for row in rows]
    return {
        "name": course.name,
        "method": course.method,
        "seed": course.seed,
        "domains": list(domains),
        "matrix": matrix,
        **_accuracy([row["accuracy"] for row in every], domains),
        "general": rises,
        "error": error,
        **transfer(matrix),
    }


def _accuracy(scored: Sequence[Mapping[str, float]], domains: Sequence[str]) -> dict[str, Any]:
    """The matrix of accuracies, null for a domain without questions, and its transfer over those
    that have some.
    """
    asked = [number for number, domain in enumerate(domains, 1) if domain in scored[0]]
    if not asked:
        return {"accuracy": None, "accuracy_transfer": None}
    known = [[row[domains[number - 1]] for number in asked] for row in scored]
    return {
        "accuracy": [[row.get(domain) for domain in domains] for row in scored],
        "accuracy_transfer": of_accuracy(known, asked, steps=len(domains)),
    }


def _steps(
    campaign: Campaign,
    course: Course,
    settings: Sequence[Mapping[str, Any]],
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
        options = tune_options(
            campaign.experiment,
            given,
            data=domain.train,
            replay=keep[number - 1],
            importance=campaign.recipes.get(str(given.get("importance")), {}).get("path"),
            out=str(folder),
            seed=course.seed,
        )
        # Only the first step may start from the recorded adapter.
        anchor = "base" if each and options.anchor == "recorded" else options.anchor
        options = dataclasses.replace(options, anchor=anchor, resume=True)
        each.append(Step(domain, options, folder))
    return Steps(tuple(each))


def _check_one_kind(settings: Sequence[Mapping[str, Any]]) -> None:
    recipes = [given.get("importance") for given in settings]
    for before, recipe in itertools.pairwise(recipes):
        if recipe and recipe != before:
            raise ValueError(
                f"the importance chosen is '{recipe}' after '{before}' for the "
                "domain before: a sequence adds one kind up; lay "
                "`importance` over the method in `sequences`"
            )


def _with_earlier(settings: Mapping[str, Any], before: Sequence[Step]) -> dict[str, Any]:
    """The settings with the earlier adapters for o-lora, which is plain where there are none."""
    given = dict(settings)
    methods = str(given["method"]).split(",")
    if "o-lora" in methods and before:
        given["earlier"] = ",".join(str(step.folder / "final") for step in before)
    elif "o-lora" in methods:
        given["method"] = ",".join(name for name in methods if name != "o-lora") or "plain"
        given.pop("orthogonality", None)
    return given


def _to_keep(campaign: Campaign, course: Course, number: int) -> str:
    """The text that must not be lost: the recorded general text, from the second step on with the
    training rows of the domains before, well mixed.
    """
    general = campaign.files[f"general/{campaign.experiment.recorded}/record"]
    earlier = course.spec.domains[: number - 1]
    if not earlier:
        return general
    rows: list[dict[str, Any]] = [
        dataclasses.asdict(document) for document in load_documents(general)
    ]
    for domain in earlier:
        rows += list(load_training_data(campaign.files[f"domain/{domain}/train"]))
    if not all(row.get("messages") for row in rows):
        rows = [{"text": row_text(row)} for row in rows]
    lines = []
    for row in rows:
        given = {key: value for key, value in row.items() if value is not None}
        lines.append(json.dumps(given, ensure_ascii=False))
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    path = course.place / f"keep-{number}.jsonl"
    write_text(path, "\n".join(lines) + "\n")
    return str(path)


def _step_address(
    campaign: Campaign,
    steps: Steps,
    number: int,
    settings: Mapping[str, Any],
    text: str,
    before: str,
) -> str:
    """A hash of all that decides a step and of the step before it; the model that it stands on and
    the earlier adapters follow from that.
    """
    experiment = campaign.experiment
    step, domains = steps.each[number - 1], [step.domain.name for step in steps.each]
    held = [
        step.domain.train,
        *(campaign.files[f"general/{name}/test"] for name in experiment.general),
        *(campaign.files[f"domain/{name}/test"] for name in domains),
    ]
    questions = {name: task for name, task in domain_tasks(experiment).items() if name in domains}
    more = [
        "step",
        before,
        campaign.recipes.get(str(settings.get("importance")), {}).get("mark"),
        sha256_file(text),
        [sha256_file(path) for path in held],
        experiment.limit.get("test"),
        experiment.characters,
        *([questions, question_limit(experiment)] if questions else []),
    ]
    return identity(dataclasses.replace(step.options, earlier=None), more=more)


def _taken(
    campaign: Campaign, steps: Steps, number: int, settings: Mapping[str, Any], address: str
) -> dict[str, Any]:
    """What was measured after a step, which is taken first where it is not finished.

    step.json says from the start whose the folder is; the numbers come into it last.
    """
    step = steps.each[number - 1]
    path = step.folder / "step.json"
    if not path.exists() or read_json(path)["id"] != address:
        discard(step.folder)
        step.folder.mkdir(parents=True)
        write_json(path, {"id": address})
    if "domains" not in read_json(path):
        with _said_into(step.folder / "log.txt"):
            run = take(steps, number)
            about = {"id": address, "settings": settings, "energy": run["energy"]}
            about["seconds"] = run["train_seconds"]
            write_json(path, about | _measured_step(campaign, steps, number))
    clear(step)
    if number > 1:
        discard(steps.each[number - 2].folder / "adapter")
    measured: dict[str, Any] = read_json(path)
    return measured


def _measured_step(campaign: Campaign, steps: Steps, number: int) -> dict[str, Any]:
    """The losses and accuracies of the model after a step."""
    domains = [step.domain.name for step in steps.each]
    tokenizer = load_tokenizer(steps.each[0].options)
    model = model_after(steps, number)
    losses = losses_on(campaign.experiment, model, tokenizer, campaign.files, "test", domains)
    accuracy = score_domains(campaign.experiment, model, tokenizer, domains)
    return {**losses, "accuracy": accuracy}


@contextlib.contextmanager
def _said_into(path: Path) -> Iterator[None]:
    """What is printed goes into a file."""
    with (
        open(path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
