"""Domains one after another: each is tuned on the merged result of the last, and every domain and
general text is measured after each.

    DIR/sequences/NAME/METHOD-SEED/1-DOMAIN/step.json     one step, with the losses on the test
                                                          parts
    DIR/sequences/NAME/METHOD-SEED/1-DOMAIN/adapter/      its adapter; model/ is the merged result,
                                                          kept for the last step only
    DIR/sequences.json                                    all of them, with losses, accuracies of
                                                          domains with questions, average and
                                                          transfer (sequence/transfer.py)

A method is tuned at the settings chosen for it on each domain, with the test seeds. From the second
step on, what must not be lost are the general text and the domains before: importance is
consolidated with that of the domain before (sequence/importance.py, as `tune` on several domains
does) and the anchor is the merged model; `replay: recorded` is general text and the rows of the
domains before. A step's address is a hash of all that decides it and of the step before: an
interruption loses one step. It costs a training, a recording and a merged model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.compare.accuracy import domain_tasks, question_limit, score_domains
from forgetless.compare.experiment import Experiment, SequenceSpec, identity, tune_options
from forgetless.data.documents import load_documents
from forgetless.data.tasks import load_training_data, row_text
from forgetless.evaluate.losses import TextLoss
from forgetless.files.atomic import discard, read_json, write_json, write_text
from forgetless.files.provenance import sha256_file
from forgetless.model.loading import load_model, load_tokenizer, save_whole
from forgetless.model.stages import merged
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.sequence.transfer import of_accuracy, transfer

logger = logging.getLogger("forgetless")
Chosen = Mapping[tuple[str, str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What every step shares: the experiment, its files and recipes, the base's numbers on the test
    parts, and how a model is evaluated on them.
    """

    experiment: Experiment
    files: Mapping[str, str]
    recipes: Mapping[str, dict[str, Any]]
    base: Mapping[str, Any]
    evaluate: Callable[
        [Any, Any, list[str]], dict[str, Any]
    ]  # (model, tokenizer, domains) -> {general: {text: numbers}, domains: {domain: numbers}}
    accuracy: Mapping[str, float]  # of the base, of each domain with questions
    out: Path


def run_sequences(campaign: Campaign, chosen: Chosen) -> list[dict[str, Any]]:
    """Run every sequence that is not finished, one after another; writes and returns what is in
    DIR/sequences.json.
    """
    found: list[dict[str, Any]] = []
    for name, spec in campaign.experiment.sequences.items():
        for method in spec.methods:
            for seed in campaign.experiment.seeds["test"]:
                result = _run_one(campaign, name, spec, method, seed, chosen)
                found.append(result)
                write_json(campaign.out / "sequences.json", found)
                numbers = ", ".join(
                    f"{key.replace('_', ' ')} {result[key]:.3f}"
                    for key in ("average", "backward_transfer")
                    if result[key] is not None
                )
                logger.info(
                    "sequence %s, %s, seed %d: %s", name, method, seed, result["error"] or numbers
                )
    return found


def _run_one(
    campaign: Campaign, name: str, spec: SequenceSpec, method: str, seed: int, chosen: Chosen
) -> dict[str, Any]:
    """One method through one sequence, as compare.json has it; a failure ends it there and is told."""
    rows, scored, general, error = [campaign.base["domains"]], [campaign.accuracy], [], None
    place = campaign.out / "sequences" / name / f"{method}-{seed}"
    try:
        for step in _steps(campaign, spec, method, seed, chosen, place):
            rows.append(step["domains"])
            scored.append(step["accuracy"])
            general.append(step["general"])
    except Exception as failure:  # a result, as a failed run is
        logger.warning("sequence %s, %s, seed %d: %s", name, method, seed, failure)
        error = f"{type(failure).__name__}: {failure}"
    matrix = [[row[domain]["nats"] for domain in spec.domains] for row in rows]
    rises = {}
    for text in campaign.experiment.general:
        before = TextLoss.read(campaign.base["general"][text])
        rises[text] = [before.rise(TextLoss.read(step[text])).nats for step in general]
    return {
        "name": name,
        "method": method,
        "seed": seed,
        "domains": list(spec.domains),
        "matrix": matrix,
        **_accuracy(scored, spec.domains),
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
    campaign: Campaign, spec: SequenceSpec, method: str, seed: int, chosen: Chosen, place: Path
) -> Iterator[dict[str, Any]]:
    """What was measured after each step; steps that are finished are read."""
    last: Path | None = None
    before = ""
    adapters: list[str] = []
    for number, domain in enumerate(spec.domains, 1):
        folder, earlier = place / f"{number}-{domain}", spec.domains[: number - 1]
        settings = spec.settings(method, domain, chosen)
        text = _to_keep(campaign, earlier, place / f"keep-{number}.jsonl")
        model = str(last / "model") if last else str(campaign.experiment.model["model"])
        options = _options(
            campaign,
            settings,
            domain,
            model=model,
            text=text,
            folder=folder,
            adapters=adapters,
            seed=seed,
        )
        address = _address(campaign, options, settings, domain, text, spec.domains, before)
        if not (folder / "step.json").exists() or read_json(folder / "step.json")["id"] != address:
            discard(folder)
            if (
                last is not None and not (last / "model").is_dir()
            ):  # deleted when the step to be made anew was first finished
                _merge_again(campaign, earlier, place)
            _take(campaign, options, settings, last, folder, address, list(spec.domains))
        yield read_json(folder / "step.json")
        if last is not None:
            discard(last / "model")
        last, before = folder, address
        adapters.append(str(folder / "adapter"))


def _options(
    campaign: Campaign,
    settings: Mapping[str, Any],
    domain: str,
    *,
    model: str,
    text: str,
    folder: Path,
    adapters: list[str],
    seed: int,
) -> TuneOptions:
    """The options of one step.

    Without an earlier adapter o-lora is plain; the importance of the first step is the
    experiment's, and so is its anchor.
    """
    given = dict(settings)
    methods = str(given["method"]).split(",")
    if "o-lora" in methods and adapters:
        given["earlier"] = ",".join(adapters)
    elif "o-lora" in methods:
        given["method"] = ",".join(name for name in methods if name != "o-lora") or "plain"
        given.pop("orthogonality", None)
    recorded = (
        str(folder / "importance.safetensors")
        if adapters
        else campaign.recipes.get(str(given.get("importance")), {}).get("path")
    )
    options = tune_options(
        campaign.experiment,
        given,
        data=campaign.files[f"domain/{domain}/train"],
        replay=text,
        importance=recorded,
        out=str(folder / "work"),
        seed=seed,
    )
    anchor = "base" if adapters and options.anchor == "recorded" else options.anchor
    return dataclasses.replace(options, model=model, anchor=anchor, overwrite=True)


def _to_keep(campaign: Campaign, earlier: tuple[str, ...], path: Path) -> str:
    """The text that must not be lost: the recorded general text, from the second step on with the
    training rows of the domains before, well mixed.
    """
    general = campaign.files[f"general/{campaign.experiment.recorded}/record"]
    if not earlier:
        return general
    rows: list[dict[str, Any]] = [
        dataclasses.asdict(document) for document in load_documents(general)
    ]
    for domain in earlier:
        rows += list(load_training_data(campaign.files[f"domain/{domain}/train"]))
    if not all(row.get("messages") for row in rows):
        rows = [{"text": row_text(row)} for row in rows]
    lines = [
        json.dumps(
            {key: value for key, value in row.items() if value is not None}, ensure_ascii=False
        )
        for row in rows
    ]
    write_text(
        path,
        "\n".join(sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())) + "\n",
    )
    return str(path)


def _address(
    campaign: Campaign,
    options: TuneOptions,
    settings: Mapping[str, Any],
    domain: str,
    text: str,
    domains: tuple[str, ...],
    before: str,
) -> str:
    """A hash of all that decides a step and of the step before it; the merged model and earlier
    adapters follow from that.
    """
    experiment, held = (
        campaign.experiment,
        [
            *(f"general/{name}/test" for name in campaign.experiment.general),
            *(f"domain/{name}/test" for name in domains),
        ],
    )
    hashes = [sha256_file(campaign.files[key]) for key in (f"domain/{domain}/train", *held)]
    recipe = campaign.recipes.get(str(settings.get("importance")), {}).get("mark")
    alike = dataclasses.replace(options, model=experiment.model["model"], earlier=None)
    questions = {name: task for name, task in domain_tasks(experiment).items() if name in domains}
    asked = [questions, question_limit(experiment)] if questions else []
    added = (
        ["consolidated"] if options.importance and before else []
    )  # by a rule that is among the options
    more = [
        "sequence",
        before,
        recipe,
        sha256_file(text),
        hashes,
        experiment.limit.get("test"),
        experiment.characters,
        *asked,
        *added,
    ]
    return identity(alike, more=more)


def _take(
    campaign: Campaign,
    options: TuneOptions,
    settings: Mapping[str, Any],
    last: Path | None,
    folder: Path,
    address: str,
    domains: list[str],
) -> None:
    """One step, on top of the one in the folder `last`: consolidate importance, tune, merge,
    measure. step.json is written last.
    """
    from forgetless.tune.tune import tune

    folder.mkdir(parents=True)
    with (
        open(folder / "log.txt", "w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        if last is not None and options.importance:
            options = dataclasses.replace(
                options, importance=_held_by(campaign, options, settings, last, folder)
            )
        finished = tune(dataclasses.replace(options, consolidate=None))
        (folder / "work" / "final").replace(folder / "adapter")
        discard(folder / "work")
        model, tokenizer = _merged(options, folder)
        found = {
            **campaign.evaluate(model, tokenizer, domains),
            "accuracy": score_domains(campaign.experiment, model, tokenizer, domains),
        }
    write_json(
        folder / "step.json",
        {
            "id": address,
            "settings": settings,
            "energy": finished["energy"],
            "seconds": finished["train_seconds"],
            **found,
        },
    )


def _held_by(
    campaign: Campaign, options: TuneOptions, settings: Mapping[str, Any], last: Path, folder: Path
) -> str:
    """The importance file of a step: that of the step before, consolidated with the domain that was
    learned in it.
    """
    from forgetless.sequence.importance import consolidate

    before, recipe = (
        last / "importance.safetensors",
        read_json(last / "step.json")["settings"].get("importance"),
    )
    if recipe != settings["importance"]:
        raise ValueError(
            f"the importance chosen is '{settings['importance']}' after '{recipe}' for the "
            "domain before: a sequence adds one kind up; lay "
            "`importance` over the method in `sequences`"
        )
    so_far = (
        str(before) if before.exists() else campaign.recipes[str(settings["importance"])]["path"]
    )
    learned = campaign.files[f"domain/{last.name.partition('-')[2]}/train"]
    held_by = consolidate(
        so_far,
        learned,
        None,
        lambda: load_model(options),
        options,
        folder / "importance.safetensors",
        saved=True,
    )
    discard(folder / "domain.safetensors")
    return held_by


def _merged(options: TuneOptions, folder: Path) -> tuple[Any, Any]:
    """The model of `options` with the step's adapter in its weights, saved to FOLDER/model, and its
    tokenizer; a fully fine-tuned one is that already.
    """
    tokenizer, adapter = load_tokenizer(options), str(folder / "adapter")
    model: Any = (
        load_model(options, adapter) if options.full else merged(load_model(options), adapter)
    )
    save_whole(model, tokenizer, folder / "model")
    return model, tokenizer


def _merge_again(campaign: Campaign, domains: tuple[str, ...], place: Path) -> None:
    """Make the model after the last of `domains` from the adapters, whose merged models were
    deleted.
    """
    model = campaign.experiment.model["model"]
    for number, domain in enumerate(domains, 1):
        folder = place / f"{number}-{domain}"
        full = (folder / "adapter" / "config.json").is_file()
        _merged(
            resolve(TuneOptions, {**campaign.experiment.model, "model": model, "full": full}),
            folder,
        )
        if number > 1:
            discard(place / f"{number - 1}-{domains[number - 2]}" / "model")
        model = str(folder / "model")
