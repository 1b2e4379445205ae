"""forgetless demo MODEL: the whole method on a chat model, with nothing but the model.

The demo is an experiment that `compare` runs (chat_experiment.py). The model answers prompts of
ours, importance is recorded on its answers and some are kept in the file; then it is taught a guild
that does not exist (guild.txt), plainly and held. What it has learned is the fall of the loss on
questions that it never saw, what it has lost the divergence from the base on its answers to other
prompts. Then all three models answer some prompts, and their behaviour is compared.

Everything is written under `--out`: the conversations as JSON lines, the importance file and the
adapters where `compare` puts them, demo.json, demo.md (the table and six conversations), and the
page: compare.json and report.html. What is finished is not run again.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from forgetless.compare.compare import check_any_done, run_experiment
from forgetless.compare.experiment import Experiment
from forgetless.data.documents import load_rows
from forgetless.demo.chat_experiment import (
    ANSWERS,
    GUILD_FILES,
    HALF,
    chat_experiment,
    write_guild,
)
from forgetless.demo.chat_result import ChatDemo, ChatState, JudgedRun
from forgetless.demo.chat_table import chat_table, side_by_side
from forgetless.demo.chat_time import expected_seconds
from forgetless.errors import OptionError
from forgetless.evaluate.conversations import AskedBase, ask_base
from forgetless.evaluate.domain_form import completions_of
from forgetless.files.atomic import write_text
from forgetless.files.behaviours_json import BehaviourChange
from forgetless.files.compare_json import Comparison, Sample
from forgetless.files.outputs import claim, ours_in
from forgetless.files.room import check_output_folder
from forgetless.files.schema import plain_of, read_record, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.model.adapter_files import load_tuned
from forgetless.model.loading import load_tokenizer, seed_and_threads
from forgetless.model.precision import load_to_train
from forgetless.options.compare import DemoOptions
from forgetless.options.finished import EvalOptions
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve
from forgetless.report.contents import completed
from forgetless.report.page import write_report

logger = logging.getLogger("forgetless")
# What this demo writes in its folder beside what `compare` does there.
CHAT_DEMO_WRITES = (
    *(f"{name}.jsonl" for name in GUILD_FILES),
    "said",
    "demo.json",
    "demo.md",
    "report.html",
)
# Of the guild's questions that `compare` has asked, so many are shown, and so many conversations
# for each reason to show one: the largest change, and at random. Six together.
SHOWN_EACH = 2
# The behaviours whose rates stand in the table, where they were judged.
IN_TABLE = ("ends", "repeats", "system", "domain leak")


def demo_on_model(options: DemoOptions) -> JsonObject:
    """Run the experiment, ask all three models, print the table, write everything under
    `options.out`.

    Raises OptionError for a model without a chat template, ValueError for a folder that is not this
    demo's.
    """
    out = Path(options.out)
    check_output_folder(out)
    _check_own_folder(out)
    _say_what_comes(options)
    claim(out, "demo", CHAT_DEMO_WRITES, {})
    started = time.perf_counter()
    asked = chat_experiment(options, write_guild(out))
    summary = run_experiment(asked, out)
    check_any_done(summary)
    judged = _judged_runs(options, asked, summary, out)
    states = _states(summary, judged)
    result = ChatDemo(options.model, states, time.perf_counter() - started)
    write_record(out / "demo.json", result)
    summary = replace(
        summary,
        verdict=[*_verdict_on(result), *summary.verdict],
        samples=list(_shown(summary, judged)),
        behaviours=list(_named_behaviours(judged)),
        not_judged=next(iter(judged.values())).not_judged if judged else [],
    )
    write_record(out / "compare.json", summary)
    report = write_report(completed(summary), out / "report.html")
    shown = chat_table(result)
    write_text(out / "demo.md", f"{shown}\n\n{side_by_side(summary.samples)}\n")
    print(shown)
    print(_next_steps(options, out, result, report))
    return plain_of(result)


def _check_own_folder(out: Path) -> None:
    ours = ours_in(out)
    if any(out.iterdir()) and f"{GUILD_FILES[0]}.jsonl" not in ours:
        raise ValueError(
            f"'{out}' is not empty and holds no demo on a chat model; give another --out"
        )


def _say_what_comes(options: DemoOptions) -> None:
    """Say what will be done and about how long it takes, by the model itself."""
    if not getattr(load_tokenizer(options), "chat_template", None):
        raise OptionError(
            f"{options.model} has no chat template, so that it cannot be asked anything; give a "
            "chat model, or leave MODEL out for the demo that comes with the package"
        )
    seed_and_threads(options)
    minutes = expected_seconds(load_to_train(options).eval(), options) / 60
    logger.info(
        "1. %s answers prompts of ours: 3 times %d answers of at most %d tokens",
        options.model,
        options.answers,
        options.answer_length,
    )
    logger.info("2. what matters for these answers is recorded, and some of them are kept")
    logger.info(
        "3. it is taught a guild that does not exist: %d steps plainly, and as many held",
        options.steps,
    )
    logger.info("4. learning, divergence and behaviours of both are measured and shown")
    logger.info(
        "this takes about %.0f minutes; interrupted, the same command goes on", max(1.0, minutes)
    )


def _judged_runs(
    options: DemoOptions, asked: Experiment, summary: Comparison, out: Path
) -> dict[str, JudgedRun]:
    """Method -> how the model of its first run behaves beside its base."""
    how = [options.behaviours, options.answer_length]
    runs = {run.method: run for run in reversed(summary.runs) if run.done}
    paths = {name: out / "said" / f"{runs[name].id}.json" for name in asked.methods if name in runs}
    judged = {name: read_record(path, JudgedRun) for name, path in paths.items() if path.exists()}
    judged = {name: each for name, each in judged.items() if each.asked == how}
    waiting = [name for name in paths if name not in judged]
    if waiting:
        loading = resolve(ModelOptions, asked.model)
        tokenizer = load_tokenizer(loading)
        base = _asked_base(options, loading, out)
        for name in waiting:
            tuned = load_tuned(loading, out / "runs" / str(runs[name].id) / "adapter")
            behaved = base.compared_with(tuned, tokenizer)
            judged[name] = JudgedRun(
                how,
                behaved.behaviours,
                list(behaved.not_judged),
                behaved.conversations,
                dict(behaved.said),
            )
            write_record(paths[name], judged[name])
    return {name: judged[name] for name in paths}


def _asked_base(options: DemoOptions, loading: ModelOptions, out: Path) -> AskedBase:
    """The base model, asked what behaviours are judged by."""
    asking = EvalOptions(
        model=options.model, behaviours=options.behaviours, answer_length=options.answer_length
    )
    taught = completions_of(load_rows(str(out / f"{GUILD_FILES[0]}.jsonl")))
    asked = ask_base(load_to_train(loading), load_tokenizer(loading), asking, taught)
    assert asked is not None  # behaviours are asked for
    return asked


def _states(summary: Comparison, judged: Mapping[str, JudgedRun]) -> dict[str, ChatState]:
    """What each state of the model has learned and lost."""
    plain, hold = judged.get("plain"), judged.get("hold")
    before = {each.counts: each for each in _of_table(plain or hold)}
    base = {str(name): each.before for name, each in before.items()}
    return {
        "base": ChatState(0.0, 0.0, base),
        "plain": _state_at(summary, "plain", 1.0, plain),
        "plain, halved": replace(_state_at(summary, "plain", HALF, None), seconds=None),
        "hold": _state_at(summary, "hold", 1.0, hold),
    }


def _state_at(
    summary: Comparison, method: str, scale: float, judged: JudgedRun | None
) -> ChatState:
    """The mean over seeds of a method's update at a scale."""
    runs = [run for run in summary.runs if run.method == method and run.done]
    points = [point for run in runs for point in run.points if point.scale == scale]
    learned = [point.learning.nats for point in points if point.learning]
    lost = [change.nats for point in points if (change := point.forgetting.get(ANSWERS))]
    return ChatState(
        learning=_mean_of(learned),
        divergence=_mean_of(lost),
        behaviours={str(each.counts): each.after for each in _of_table(judged)},
        seconds=_mean_of([run.seconds for run in runs]),
    )


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _of_table(judged: JudgedRun | None) -> list[BehaviourChange]:
    """The behaviours whose rates stand in the table."""
    return [each for each in judged.behaviours if each.name in IN_TABLE] if judged else []


def _named_behaviours(judged: Mapping[str, JudgedRun]) -> Iterator[BehaviourChange]:
    """All behaviours of both methods, each with the method's name."""
    for name, each in judged.items():
        for change in each.behaviours:
            yield replace(change, counts=f"{name}: {change.counts}")


def _shown(summary: Comparison, judged: Mapping[str, JudgedRun]) -> Iterator[Sample]:
    """Six conversations: of the guild, those that plain fine-tuning changed most, and at random."""
    for sample in summary.samples[:SHOWN_EACH]:
        yield replace(sample, domain=f"{sample.domain}: new")
    if not judged:
        return
    first = next(iter(judged.values()))
    for why in ("largest change", "at random"):
        chosen = [each for each in first.conversations if each.chosen == why]
        for each in chosen[:SHOWN_EACH]:
            outputs = {name: run.said.get(str(each.prompt)) for name, run in judged.items()}
            yield Sample(f"{each.kind}: {why}", each.prompt, None, {"base": each.before, **outputs})


def _verdict_on(result: ChatDemo) -> list[str]:
    """What came out, in the plainest words; the comparison's own sentences come after it."""
    plain, hold = result.states["plain"], result.states["hold"]
    if None in (plain.learning, plain.divergence, hold.learning, hold.divergence):
        return []
    return [
        f"Taught the guild plainly, the model learned {plain.learning:.3f} nats per token and "
        f"moved {plain.divergence:.3f} away from what it would say; held, it learned "
        f"{hold.learning:.3f} and moved {hold.divergence:.3f}."
    ]


def _next_steps(options: DemoOptions, out: Path, result: ChatDemo, report: Path) -> str:
    """What was measured and written, and the next commands."""
    lines = [
        "",
        "learned: fall of the loss on 20 questions about the guild that it never saw; moved: "
        f"divergence on its own answers to {options.answers} prompts that nothing was held to",
        f"behaviours: rates on {options.behaviours} prompts; all of them, with their noise, are on "
        "the page",
        f"written to {out}/: demo.json, demo.md with six conversations; took {result.seconds:.0f} "
        "s",
        f"the page, to open in a browser: {report}",
        "",
        "With data of yours:",
        f"  forgetless tune {options.model} --data chats.jsonl --general chat --out run",
    ]
    return "\n".join(lines)
