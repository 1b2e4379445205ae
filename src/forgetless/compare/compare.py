"""compare(): runs what an experiment asks for and has not been run yet, one process or several, and
keeps DIR/compare.json up to date.

    DIR/data/               the parts of every text and domain, carved once
    DIR/base.json           the bare base model on each of them
    DIR/importance/         one file per recipe
    DIR/runs/ID/run.json    one run; ID is a hash of all that decides it, so what is finished is
                            never run again
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
import hashlib
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from forgetless.compare.accuracy import check_questions, score_all, score_base, spread
from forgetless.compare.experiment import (
    RECORDED,
    Experiment,
    Trial,
    final_trials,
    identity,
    record_options,
    tune_options,
    validation_trials,
)
from forgetless.compare.experiment_file import read
from forgetless.compare.processes import running
from forgetless.compare.sequences import Campaign, run_sequences
from forgetless.compare.summary import CURRENT, choose, ended, summarise
from forgetless.compare.trial import evaluate, run, was_killed
from forgetless.compare.verdict import progress_line
from forgetless.data.documents import load_documents
from forgetless.data.duplicates import carve
from forgetless.data.encoding import templated
from forgetless.data.tasks import load_training_data
from forgetless.errors import OptionError
from forgetless.files.atomic import read_json, write_json, write_text
from forgetless.files.compare_json import TrialRun
from forgetless.files.lock import only_writer
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.schema import read_record
from forgetless.methods.table import chosen as chosen_methods
from forgetless.model.adapter_files import load_tuned
from forgetless.model.linear import unwrapped
from forgetless.model.loading import context_length, load_model, load_tokenizer
from forgetless.options.compare import CompareOptions
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve

logger = logging.getLogger("forgetless")
PARTS = ("validation", "test")
SHARES = {
    "text": {True: (0.8, 0.2), False: (0.6, 0.2, 0.2)},
    "other": {True: (1.0,), False: (0.5, 0.5)},
}  # by whether a test file is given
ENDED = ("done", "out of memory")  # not tried again
SAMPLES, SAMPLE_TOKENS = 3, 40  # prompts of each domain that are answered in the report


def compare(options: CompareOptions) -> dict[str, Any]:
    """Run the experiment and return the summary.

    Raises OptionError or ValueError for what is wrong with it before anything is trained.
    """
    experiment, out = read(options.experiment), Path(options.out)
    check_methods(experiment)
    check_questions(experiment)
    if options.dry_run:
        print(_plan(experiment, options.part))
        return {}
    with only_writer(out):
        write_text(
            out / "experiment.yaml",
            yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(experiment))), sort_keys=False),
        )
        files = prepare(experiment, out)
        measure_base(experiment, files, out)
        recipes = record_all(experiment, files, out)
        jobs = [
            _job(experiment, trial, files, recipes, out) for trial in validation_trials(experiment)
        ]
        _run_all(
            experiment,
            jobs,
            options.jobs,
            out,
            later=0 if options.part == "validation" else _to_test(experiment, out),
        )
        if options.part != "validation" and experiment.seeds.get("test"):
            chosen = choose(experiment, ended(out, _trials(jobs)))
            final = [
                _job(experiment, trial, files, recipes, out)
                for trial in final_trials(experiment, chosen)
            ]
            _run_all(experiment, final, options.jobs, out, before=jobs)
            jobs += final
            if experiment.sequences:
                base = read_json(out / "base.json")["test"]
                measured = lambda model, tokenizer, domains: evaluate(
                    experiment, model, tokenizer, files, "test", domains
                )
                run_sequences(
                    Campaign(
                        experiment, files, recipes, base, measured, score_base(experiment, out), out
                    ),
                    chosen,
                )
        score_all(experiment, jobs, out, options.jobs)
        _answer(experiment, _shown(experiment, jobs, out), files, out)
        summary = summarise(out, _trials(jobs))
    print("\n".join(summary["verdict"]))
    if not any(run["status"] == "done" for run in summary["runs"]):
        raise ValueError(
            f"no run of {len(jobs)} succeeded; the first error was: {summary['runs'][0]['error']}"
        )
    return summary


def check_methods(experiment: Experiment) -> None:
    """Raise OptionError for methods that do not exist, cannot be combined or lack what they need,
    in any setting.
    """
    for label, method in experiment.methods.items():
        for settings in method.settings():
            try:
                chosen_methods(
                    tune_options(
                        experiment, settings, data="x", replay="x", importance="x", out="x", seed=0
                    )
                )
            except OptionError as error:
                raise OptionError(f"methods: {label}: {error}") from None


def _plan(experiment: Experiment, part: str) -> str:
    trials = validation_trials(experiment)
    final = (
        0
        if part == "validation"
        else len(experiment.methods)
        * len(experiment.domains)
        * len(experiment.seeds.get("test", []))
    )
    lines = [
        f"{experiment.title}: {len(trials)} validation runs and {final} test runs; general text "
        f"{', '.join(experiment.general)}"
    ]
    steps = sum(
        len(spec.domains) * len(spec.methods) * len(experiment.seeds.get("test", []))
        for spec in experiment.sequences.values()
    )
    if steps and part != "validation":
        orders = ", ".join(
            f"{name} ({', '.join(spec.domains)})" for name, spec in experiment.sequences.items()
        )
        lines.append(f"  and {steps} runs one after another: {orders}")
    for label, method in experiment.methods.items():
        lines.append(
            f"  {label:<20} {method.options['method']:<16} "
            f"{' '.join(f'{key}={values}' for key, values in method.grid.items())}"
        )
    return "\n".join(lines)


def prepare(experiment: Experiment, out: Path) -> dict[str, str]:
    """Carve every text and domain into parts:

    'general/NAME/record', 'general/NAME/test', 'domain/NAME/train', ... -> file.
    """
    files: dict[str, str] = {}
    for name, place in experiment.general.items():
        own = name == experiment.recorded
        rows = [dataclasses.asdict(document) for document in load_documents(place["text"])]
        held = (
            [dataclasses.asdict(document) for document in load_documents(place["test"])]
            if "test" in place
            else None
        )
        parts = (("record",) if own else ()) + (PARTS if held is None else PARTS[:1])
        files |= _carved(
            out,
            f"general/{name}",
            rows,
            held,
            parts,
            SHARES["text" if own else "other"][held is not None],
        )
    for name, place in experiment.domains.items():
        rows = list(load_training_data(place["data"]))
        held = list(load_training_data(place["test"], split=None)) if "test" in place else None
        files |= _carved(
            out,
            f"domain/{name}",
            rows,
            held,
            ("train", *(PARTS if held is None else PARTS[:1])),
            SHARES["text"][held is not None],
        )
    return files


def _carved(
    out: Path,
    name: str,
    rows: list[dict[str, Any]],
    held: list[dict[str, Any]] | None,
    parts: Iterable[str],
    shares: tuple[float, ...],
) -> dict[str, str]:
    """Write the parts of `rows`, and `held` as the test part in an order that depends on its text
    alone.
    """
    key = lambda row: str(row.get("prompt") or row.get("text") or row.get("messages"))
    found = {
        part: [rows[i] for i in chosen]
        for part, chosen in zip(parts, carve([key(row) for row in rows], shares), strict=True)
    }
    if held is not None:
        found["test"] = [held[i] for i in carve([key(row) for row in held], (1.0,))[0]]
    places = {}
    for part, some in found.items():
        if not some:
            raise ValueError(
                f"{name}: {len(rows)} rows leave none for the {part} part (near duplicates stay "
                "together); give more"
            )
        path = out / "data" / name / f"{part}.jsonl"
        write_text(
            path,
            "".join(
                json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False)
                + "\n"
                for row in some
            ),
        )
        places[f"{name}/{part}"] = str(path)
    return places


def measure_base(experiment: Experiment, files: dict[str, str], out: Path) -> dict[str, Any]:
    """The bare base model on every part, measured once."""
    held = {
        key: sha256_file(path)
        for key, path in sorted(files.items())
        if key.rsplit("/", 1)[1] in PARTS
    }
    mark = {
        "model": experiment.model,
        "files": held,
        "limit": experiment.limit,
        "characters": experiment.characters,
    }
    path = out / "base.json"
    if path.exists() and read_json(path)["made_from"] == json.loads(json.dumps(mark)):
        return dict(read_json(path))
    options = resolve(ModelOptions, experiment.model)
    model, tokenizer = load_model(options), load_tokenizer(options)
    base = {
        part: evaluate(experiment, model, tokenizer, files, part, experiment.domains)
        for part in PARTS
    }
    rows = {
        name: len(Path(files[f"domain/{name}/train"]).read_text(encoding="utf-8").splitlines())
        for name in experiment.domains
    }
    write_json(
        path,
        {
            "made_from": mark,
            "environment": environment(str(next(model.parameters()).device)),
            "rows_trained": rows,
            **base,
        },
    )
    return dict(read_json(path))


def record_all(
    experiment: Experiment, files: dict[str, str], out: Path
) -> dict[str, dict[str, Any]]:
    """Every importance file, recorded once: label -> what it is made from, and where it is."""
    from forgetless.importance.importance import Importance
    from forgetless.record.record import record

    general = files[f"general/{experiment.recorded}/record"]
    found = {}
    for label, recipe in experiment.importance.items():
        own = str(recipe.get("general") or general)
        mark = [experiment.model, recipe, sha256_file(own) if Path(own).is_file() else own]
        name = f"{label}-{hashlib.sha256(json.dumps(mark, sort_keys=True, default=str).encode()).hexdigest()[:8]}"
        path = out / "importance" / f"{name}.safetensors"
        if not path.exists():
            logger.info("recording importance '%s'", label)
            path.parent.mkdir(exist_ok=True)
            record(record_options(experiment, recipe, general=general, out=str(path)))
        info = path.with_suffix(".json")
        if not info.exists():
            write_json(info, _described(Importance.load(path), label, path))
        found[label] = {"mark": mark, "path": str(path), "bytes": path.stat().st_size}
    if (out / "importance").is_dir():
        write_json(
            out / "importance" / CURRENT,
            {
                label: Path(str(one["path"])).with_suffix(".json").name
                for label, one in found.items()
            },
        )
    return found


def _described(importance: Any, label: str, path: Path) -> dict[str, Any]:
    info, settings = importance.info, importance.info.get("settings", {})
    norms = importance.norms()
    return {
        "name": label,
        "file": path.name,
        "estimator": info.get("estimator"),
        "tier": importance.tier,
        "bytes": path.stat().st_size,
        "seconds": info.get("timings", {}).get("train_seconds"),
        "tokens": settings.get("tokens") or info.get("data", {}).get("tokens"),
        "weights": [
            {"name": name, "layer": _layer(name), "kind": name.split(".")[-2], "norm": norm}
            for name, norm in norms.items()
        ],
    }


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _job(
    experiment: Experiment, trial: Trial, files: dict[str, str], recipes: dict[str, Any], out: Path
) -> dict[str, Any]:
    """All that a process needs to run one trial."""
    recipe = recipes.get(str(trial.settings.get("importance")), {})
    train, general = (
        files[f"domain/{trial.domain}/train"],
        files[f"general/{experiment.recorded}/record"],
    )
    options = tune_options(
        experiment,
        trial.settings,
        data=train,
        replay=general,
        importance=recipe.get("path"),
        out="",
        seed=trial.seed,
    )
    held = [
        files[key]
        for key in (
            *(f"general/{name}/{trial.part}" for name in experiment.general),
            f"domain/{trial.domain}/{trial.part}",
        )
    ]
    word = trial.settings.get("replay")
    replayed = (
        [sha256_file(general)]
        if word == RECORDED
        else []
        if word is None
        else [sha256_file(word) if Path(word).is_file() else word]
    )
    run = identity(
        options,
        more=[
            sha256_file(train),
            recipe.get("mark"),
            replayed,
            [sha256_file(path) for path in held],
            trial.part,
            list(experiment.scales),
            experiment.limit.get(trial.part),
            experiment.characters,
        ],
    )
    folder = out / "runs" / run
    return {
        "id": run,
        "folder": folder,
        "trial": trial,
        "options": dataclasses.replace(options, out=str(folder / "work"), overwrite=True),
        "files": files,
        "experiment": experiment,
        "file_bytes": recipe.get("bytes"),
        "base": str(out / "base.json"),
    }


def _finished(job: dict[str, Any]) -> bool:
    path = job["folder"] / "run.json"
    return path.exists() and read_record(path, TrialRun).status in ENDED


def _to_test(experiment: Experiment, out: Path) -> int:
    """How many runs on the test part are still to come, before it is known which settings they
    have.
    """
    every = (
        len(experiment.methods) * len(experiment.domains) * len(experiment.seeds.get("test", []))
    )
    found = [read_json(path) for path in out.glob("runs/*/run.json")]
    return max(0, every - sum(run["part"] == "test" and run["status"] in ENDED for run in found))


def _trials(jobs: Iterable[dict[str, Any]]) -> list[tuple[str, Trial]]:
    return [(job["id"], job["trial"]) for job in jobs]


def _run_all(
    experiment: Experiment,
    jobs: list[dict[str, Any]],
    processes: int,
    out: Path,
    before: Iterable[dict[str, Any]] = (),
    later: int = 0,
) -> None:
    """Run the jobs that are not finished, in their order, and write the summary after each.

    `later`: how many runs come after these.
    """
    waiting = {
        job["id"]: job for job in jobs if not _finished(job)
    }  # two settings may be the same run
    every = _trials((*before, *jobs))
    started = time.perf_counter()
    for done, job in enumerate(
        running(
            run, list(waiting.values()), processes, killed=was_killed, spread=spread(experiment)
        ),
        1,
    ):
        summary = summarise(out, every, pending=len(waiting) - done + later)
        seconds = (time.perf_counter() - started) / done * (len(waiting) - done + later)
        result = read_json(job["folder"] / "run.json")
        logger.info("%s", progress_line(result, summary, seconds))


def _shown(
    experiment: Experiment, jobs: Iterable[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """The runs that stand for their methods: on the test part, or at the chosen settings where
    nothing was tested.
    """
    chosen = choose(experiment, ended(out, _trials(jobs)))
    picked = [
        job
        for job in jobs
        if chosen.get((job["trial"].method, job["trial"].domain)) == job["trial"].settings
    ]
    return [job for job in picked if job["trial"].part == "test"] or picked


def _answer(
    experiment: Experiment, jobs: list[dict[str, Any]], files: dict[str, str], out: Path
) -> None:
    """Greedy answers to a few held-out prompts by the base, plain and each method of the forgetless
    family: what people want to read.
    """
    wanted = {
        experiment.reference,
        *(label for label, method in experiment.methods.items() if method.family == "hold"),
    }
    samples: list[dict[str, Any]] = []
    options = resolve(ModelOptions, experiment.model)
    for domain in experiment.domains:
        prompted = [
            _prompted(row)
            for row in load_training_data(files[f"domain/{domain}/test"], limit=SAMPLES)
        ]
        found: list[dict[str, Any]] = [
            {"domain": domain, "prompt": said, "reference": reference, "outputs": {}}
            for said, reference, _ in prompted
        ]
        last = {
            job["trial"].method: job
            for job in jobs
            if job["trial"].domain == domain
            and job["trial"].method in wanted
            and not job["options"].full
            and (job["folder"] / "adapter").is_dir()
        }
        for method in ("base", *last):
            model = (
                load_model(options)
                if method == "base"
                else load_tuned(options, last[method]["folder"] / "adapter")
            )
            for sample, (said, _, turns) in zip(found, prompted, strict=True):
                sample["outputs"][method] = _continued(model, load_tokenizer(options), said, turns)
        samples += found
    write_json(out / "samples.json", samples)


def _prompted(row: dict[str, Any]) -> tuple[str, str, list[dict[str, str]]]:
    """(prompt, what should follow, turns of a chat) of a row of domain data; running text is cut in
    the middle, a chat before its last turn.
    """
    if "prompt" in row:
        return row["prompt"], row["completion"], []
    if "text" in row:
        words = row["text"].split(" ")
        middle = max(1, len(words) // 2)
        return " ".join(words[:middle]), " ".join(words[middle:]), []
    *turns, last = row["messages"]
    return "\n".join(turn["content"] for turn in turns), last["content"], turns


def _continued(model: Any, tokenizer: Any, prompt: str, turns: list[dict[str, str]]) -> str:
    """What the model says next: after `turns` of a chat, as its template has them, or after
    `prompt`.
    """
    context = context_length(unwrapped(model))
    new = min(SAMPLE_TOKENS, context // 2)
    given = templated(tokenizer, turns, prompt=True) if turns else tokenizer(prompt)["input_ids"]
    if not given:
        return ""
    ids = torch.tensor([given[new - context :]], device=next(model.parameters()).device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
