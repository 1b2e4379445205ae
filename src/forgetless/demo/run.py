"""forgetless demo: the whole method on a model and a world that come with the package.

The demo is an experiment that `compare` runs (experiment.py). Importance is recorded on text about
the world, and the model is taught a herbal of new facts, plainly at three learning rates and held
by importance at two. What it still knows is measured as its accuracy on questions about the world,
and as its loss on text about the world in phrasings that it never saw.

Two rivals cost no method at all and are shown beside it: plain fine-tuning at a smaller learning
rate, and the plain update scaled back to 95 % of what it learns, the highest level of learning at
which `compare` tells methods apart. Everything is written under `--out`: texts and questions as
JSON lines, the importance file and the adapters where `compare` puts them, demo.json, demo.md (the
table), demo.png, and the report: compare.json and report.html. What is finished is not run again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.compare.accuracy import domain_tasks, score
from forgetless.compare.base import losses_on
from forgetless.compare.choice import curve, nats_of
from forgetless.compare.compare import check_any_done, run_experiment
from forgetless.compare.experiment import Experiment
from forgetless.compare.frontier import at_learning
from forgetless.compare.parts import prepare
from forgetless.data.documents import Row, load_rows
from forgetless.demo.experiment import DOMAIN, TEXT, TEXTS, experiment, write_texts
from forgetless.demo.result import STATES, DemoResult, RecordedFile, Seed, StateRow
from forgetless.demo.table import demo_table, plot
from forgetless.files.atomic import atomic_path
from forgetless.files.compare_json import Comparison, Sample, TrialPoint, TrialRun
from forgetless.files.outputs import claim, ours_in
from forgetless.files.room import check_output_folder
from forgetless.files.schema import T, Text, plain_of, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.model.adapter_files import load_tuned
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.model.update import AdapterUpdate
from forgetless.options.compare import DemoOptions
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve
from forgetless.report.contents import completed
from forgetless.report.page import write_report

# What the demo writes in its folder beside what `compare` does there.
DEMO_WRITES = (
    *(f"{name}.jsonl" for name in TEXTS),
    "demo.json",
    "demo.md",
    "demo.png",
    "report.html",
)
# Questions of each kind that are answered in the report.
PROMPTS = 3
# Tokens of an answer, which is cut at the end of its first sentence.
SENTENCE_TOKENS = 14
# The states of the model that a method of the experiment trains, and that method.
METHOD_OF_STATE = {"plain": "plain", "plain, smaller rate": "smaller", "hold": "hold"}


def demo(options: DemoOptions) -> JsonObject:
    """Run the experiment with so many seeds, print the table, write everything under `options.out`.

    Raises ValueError for a folder that is not the demo's.
    """
    out = Path(options.out)
    check_output_folder(out)
    if any(out.iterdir()) and "demo" not in ours_in(out).values():
        raise ValueError(f"'{out}' is not empty and holds no demo; give another --out")
    claim(out, "demo", DEMO_WRITES, {})
    started = time.perf_counter()
    paths = write_texts(out)
    asked = experiment(paths, options.seeds)
    summary = run_experiment(asked, out)
    check_any_done(summary)
    seeds = [_rows(asked, summary, out, seed) for seed in range(options.seeds)]
    result = _demonstrated(summary, out, seeds, time.perf_counter() - started)
    write_record(out / "demo.json", result)
    shown = demo_table(seeds)
    with atomic_path(out / "demo.md") as temporary:
        temporary.write_text(shown + "\n", encoding="utf-8")
    summary = replace(
        summary,
        model="the demo's own model",
        verdict=[*_verdict(result), *summary.verdict],
        samples=list(_samples(asked, summary, paths, out)),
    )
    write_record(out / "compare.json", summary)
    report = write_report(completed(summary), out / "report.html")
    print(shown)
    print(_closing(out, result, plot(seeds, out / "demo.png"), report))
    return plain_of(result)


def _rows(asked: Experiment, summary: Comparison, out: Path, seed: int) -> dict[str, StateRow]:
    """The rows of the table for one seed."""
    rows = {"base": _base(summary)}
    for name, method in METHOD_OF_STATE.items():
        run = _chosen_run(summary, method, seed)
        update = _whole_update(run)
        known, learned = _there(_there(update.accuracy_general)[TEXT]), _there(update.accuracy)
        rows[name] = StateRow(
            _there(known.after),
            rows["base"].general_loss + nats_of(update.forgetting[TEXT]),
            _there(learned.after),
            rows["base"].domain_loss - nats_of(update.learning),
            run.seconds,
            f"rate {run.settings['learning_rate']:g}",
        )
    rows["plain, scaled back"] = _scaled_back(asked, summary, out, seed)
    return {name: rows[name] for name in STATES}


def _base(summary: Comparison) -> StateRow:
    text, domain = _there(summary.texts[0].before), _there(summary.domains[0].before)
    known = _there(_there(_whole_update(summary.runs[0]).accuracy_general)[TEXT])
    return StateRow(
        _there(known.before), _there(text.nats), _there(domain.accuracy), _there(domain.nats)
    )


def _chosen_run(summary: Comparison, method: str, seed: int) -> TrialRun:
    """The run of a method at its chosen setting."""
    return next(
        run for run in summary.runs if run.method == method and run.seed == seed and run.chosen
    )


def _whole_update(run: TrialRun) -> TrialPoint:
    """What the whole update of a run does."""
    return next(point for point in run.points if point.scale == 1.0)


def _there(value: T | None) -> T:
    """A value that every demo measures. Raises ValueError where a run of it lacks one."""
    if value is None:
        raise ValueError("a run of the demo lacks a number; delete the folder, and run it again")
    return value


def _scaled_back(asked: Experiment, summary: Comparison, out: Path, seed: int) -> StateRow:
    """Plain fine-tuning's update at the scale at which it has learned the highest level of what
    plain learns, by the straight lines between the scales that were measured; whole, where it
    never does.
    """
    level = max(asked.shares)
    wanted = next(
        _there(row.learning_nats)
        for row in _there(_there(summary.equal_learning[DOMAIN])[TEXT])
        if row.method == asked.reference and row.level == level
    )
    run = _chosen_run(summary, asked.reference, seed)
    learned = [nats for nats, _ in curve(run, TEXT)]
    scales = sorted(_there(point.scale) for point in run.points)
    scale = at_learning(list(zip(learned, scales, strict=True)), wanted) or 1.0
    model = load_tuned(_loading(asked), out / "runs" / str(run.id) / "adapter")
    AdapterUpdate(model).scale(scale)
    return _state_of(asked, model, out, f"update x {scale:.2f}: {level:.0%} of its learning")


def _state_of(asked: Experiment, model: nn.Module, out: Path, setting: str) -> StateRow:
    """A row of the table for any state of the model, as `compare` measures its runs."""
    tokenizer, files = load_tokenizer(_loading(asked)), prepare(asked, out)
    losses = losses_on(asked, model, tokenizer, files, asked.last_part, [DOMAIN], [TEXT])
    questions = {**domain_tasks(asked), **asked.tasks}
    known = score(model, tokenizer, asked, questions).tasks
    return StateRow(
        _there(known[TEXT].acc),
        _there(losses.general[TEXT].nats),
        _there(known[DOMAIN].acc),
        _there(losses.domains[DOMAIN].nats),
        setting=setting,
    )


def _loading(asked: Experiment) -> ModelOptions:
    return resolve(ModelOptions, asked.model)


def _demonstrated(
    summary: Comparison, out: Path, seeds: Sequence[Seed], seconds: float
) -> DemoResult:
    """What is in demo.json."""
    recorded = summary.importance[0]
    return DemoResult(
        environment=summary.environment,
        importance=RecordedFile(
            path=str(out / "importance" / str(recorded.file)),
            mib=_there(recorded.bytes) / 2**20,
            record_seconds=recorded.seconds,
        ),
        seconds=seconds,
        seeds=list(seeds),
    )


def _verdict(result: DemoResult) -> list[str]:
    """What came out, in the plainest words; the comparison's own sentences come after it."""

    def percent(state: str, accuracy: str) -> str:
        mean = statistics.mean(getattr(rows[state], accuracy) for rows in result.seeds)
        return f"{100 * mean:.0f} %"

    recorded = result.importance
    lines = [
        f"Taught the herbal plainly, the model answers {percent('plain', 'general_accuracy')} of "
        "the questions about its world, before it was "
        f"{percent('base', 'general_accuracy')}; held, it answers "
        f"{percent('hold', 'general_accuracy')}.",
        f"Of the herbal it then knows {percent('plain', 'domain_accuracy')} (plain) and "
        f"{percent('hold', 'domain_accuracy')} (held).",
        f"The importance file took {recorded.record_seconds:.0f} s and {recorded.mib:.2f} MiB.",
    ]
    if len(result.seeds) == 1:
        lines.append("One seed says nothing about noise; forgetless demo --seeds 3 does.")
    return lines


def _samples(
    asked: Experiment, summary: Comparison, paths: Mapping[str, str], out: Path
) -> Iterator[Sample]:
    """What the base model and the two tuned ones answer to a few questions of the domain and of the
    world.
    """
    models = {"base": load_model(_loading(asked))}
    for method in ("plain", "hold"):
        folder = out / "runs" / str(_chosen_run(summary, method, 0).id) / "adapter"
        models[method] = load_tuned(_loading(asked), folder)
    tokenizer = load_tokenizer(_loading(asked))
    for about, row in _questions(paths):
        said: dict[str, Text | None] = {
            name: _says(model, tokenizer, row["prompt"]) for name, model in models.items()
        }
        yield Sample(about, row["prompt"], row["choices"][row["gold"]], said)


def _questions(paths: Mapping[str, str]) -> Iterator[tuple[str, Row]]:
    for kind, about in (("domain", "herbal: new"), ("general", "world: known before")):
        for row in load_rows(paths[f"{kind}-questions"])[:PROMPTS]:
            yield about, row


def _says(model: Any, tokenizer: Any, prompt: str) -> str:
    """The likeliest continuation of a prompt, up to the end of its sentence."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=SENTENCE_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return text.partition(".")[0] + "." if "." in text else str(text)


def _closing(out: Path, result: DemoResult, picture: Path | None, report: Path) -> str:
    """What was written, and the same three steps for the user's own model and data."""
    recorded = result.importance
    questions = len(load_rows(str(out / "general-questions.jsonl")))
    shown = f", {picture.name}" if picture else " (pip install 'forgetless[plot]' for a picture)"
    lines = [
        "",
        f"general: {questions} questions about the world that the "
        "model was trained on; domain: a herbal of new facts. "
        "Losses in nats per token, on phrasings that no training text has.",
        f"importance file: {recorded.mib:.2f} MiB, recorded in "
        f"{recorded.record_seconds:.0f} s; all of the demo took {result.seconds:.0f} s",
        f"written to {out}/: demo.json, demo.md{shown}",
        f"the report, to open in a browser: {report}",
        "",
        "With your own model and data:",
        "  forgetless record MODEL --general general.jsonl --out model.importance.safetensors",
        "  forgetless tune MODEL --data domain.jsonl --importance model.importance.safetensors "
        "--out run --general held-out.jsonl",
    ]
    return "\n".join(lines)
