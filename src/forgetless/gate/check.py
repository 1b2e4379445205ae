"""`forgetless check`: a tuned model against bounds on what it may have lost, for pipelines.

    forgetless check BASE run --budget 5% --behaviour json=-2% --task arc_easy=-1% --out checked

    import forgetless
    run = forgetless.check("BASE", "run", budget="5%", behaviour={"json": "-2%"})
    run.gate.verdict, run.gate.passed

The story: read the bounds and refuse what cannot be judged, measure the bare base and the tuned
model on the same answers, prompts and questions (as `forgetless eval` does), judge each bound by
the interval of its change (judge.py), write everything, print. The base is read once; its answers
come from the cache, or from a file of an earlier check.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.data.own_text import SELF
from forgetless.evaluate.conversations import AskedBase, ask, names_not_judged, run_keys
from forgetless.evaluate.evaluate import changes, measure
from forgetless.evaluate.own_answers import OWN_WORDS, answer_length
from forgetless.evaluate.paired_answers import (
    PairedAnswers,
    divergence_by_kind,
    paired_part,
)
from forgetless.evaluate.paired_scores import with_score_changes
from forgetless.files.atomic import write_text
from forgetless.files.gate_json import EXCEEDED, MET, Gate, StoredAnswers
from forgetless.files.measured_json import Measured
from forgetless.files.outputs import claim, local_inputs
from forgetless.files.provenance import environment
from forgetless.files.room import check_output_folder
from forgetless.files.run_json import CheckedRun
from forgetless.files.schema import plain_of, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.gate.asked import AskedForBounds, judgeable, prepare_questions
from forgetless.gate.bounds import read_bounds
from forgetless.gate.given import paired_again, read_given, write_answers
from forgetless.gate.judge import judge_bounds, verdict_over
from forgetless.gate.tuned import TunedModel, find_tuned
from forgetless.model.adapter_tokenizer import tuned_tokenizer
from forgetless.model.fingerprint import exact_fingerprint
from forgetless.model.loading import load_model, seed_and_threads
from forgetless.options.check import CheckOptions
from forgetless.options.option import as_dict
from forgetless.options.verbs import VERBS
from forgetless.report.gate import gate_in_words
from forgetless.report.gate_files import gate_junit, gate_markdown
from forgetless.report.one_run import as_comparison
from forgetless.report.page import write_report

logger = logging.getLogger("forgetless")
# What is written to --out, by name.
ANSWERS_FILE = "answers.json"
WRITTEN = ("run.json", "junit.xml", "summary.md", "report.html", ANSWERS_FILE)


@dataclass(frozen=True)
class CheckedBase:
    """What the bare base says and scores, with all that it takes to measure a tuned model."""

    before: Measured
    own: PairedAnswers | None
    asked: AskedBase | None
    weights: str  # the fingerprint of the base


def check(model: str, tuned: str, **given: Any) -> CheckedRun:
    """What `forgetless check` does, from Python: the run with its `gate`; nothing is printed.

    `given` are the options of the verb by their names; `behaviour` and `task` may be mappings of
    names to bounds. Raises ValueError or OptionError as the verb does.
    """
    for name in ("behaviour", "task"):
        if isinstance(given.get(name), Mapping):
            given[name] = [f"{key}={bound}" for key, bound in given[name].items()]
    options = VERBS["check"].resolve({"model": model, "tuned": tuned, **given})
    run = _judged_run(options)
    _write_all(options, run)
    return run


def check_verb(options: CheckOptions) -> JsonObject:
    """`forgetless check`: writes --out, then prints; returns what is in its run.json."""
    run = _judged_run(options)
    _write_all(options, run)
    print(gate_in_words(run))
    return plain_of(run)


def _judged_run(options: CheckOptions) -> CheckedRun:
    """Measure and judge. Raises ValueError or OptionError before a model is loaded, where the
    options cannot work.
    """
    started = time.perf_counter()
    bounds = read_bounds(options)
    judgeable(options, bounds)
    tuned = find_tuned(options)
    _check_out(options, tuned)
    tokenizer = tuned_tokenizer(options, tuned.folder)
    asked = prepare_questions(options, bounds, tokenizer)
    stored = read_given(options.own_answers) if options.own_answers else None
    seed_and_threads(options)
    model = load_model(options)
    tuned.give_rows(model)
    base = _measure_bare(options, asked, stored, model, tokenizer)
    if options.out and base.own is not None:
        write_answers(Path(options.out) / ANSWERS_FILE, options.model, base.weights, base.own)
    run = _compared(options, asked, base, tuned.load(options, model), tokenizer)
    judged = judge_bounds(run, asked.bounds)
    verdict = verdict_over(judged)
    passed = verdict == MET or (verdict != EXCEEDED and not options.strict)
    gate = Gate(options.tuned, verdict, passed, options.strict, judged)
    return replace(run, gate=gate, verdict=verdict, seconds=time.perf_counter() - started)


def _check_out(options: CheckOptions, tuned: TunedModel) -> None:
    """Raise ValueError for an output folder that is read from, holds what another verb wrote, or
    cannot be written to.
    """
    if options.out is None:
        return
    check_output_folder(options.out)
    inputs = {**local_inputs(options), f"'{tuned.folder}'": tuned.folder.resolve()}
    claim(options.out, "check", WRITTEN, inputs)


def _measure_bare(
    options: CheckOptions,
    asked: AskedForBounds,
    stored: StoredAnswers | None,
    model: nn.Module,
    tokenizer: Any,
) -> CheckedBase:
    """Measure the bare base, and let it say what it is asked."""
    if asked.held_out.own is not None and not options.general:
        kind = asked.held_out.own.kind
        logger.info("judging on %s", OWN_WORDS.get(kind, OWN_WORDS[SELF]))
    if stored is not None:
        own: PairedAnswers | None = paired_again(stored, str(options.own_answers), model)
    else:
        wanted = asked.held_out.own
        own = paired_part(model, tokenizer, wanted, "check", sampling=not options.fast)
    said = None
    if asked.prompts:
        length = answer_length(model, options.answer_length)
        said = ask(model, tokenizer, asked.prompts, length, asked.completions, asked.refused)
    before = measure(model, tokenizer, asked.held_out, own=own, is_base=True)
    return CheckedBase(before, own, said, exact_fingerprint(model))


def _compared(
    options: CheckOptions,
    asked: AskedForBounds,
    base: CheckedBase,
    tuned: nn.Module,
    tokenizer: Any,
) -> CheckedRun:
    """The tuned model beside its base, not judged yet."""
    after = measure(tuned, tokenizer, asked.held_out, own=base.own)
    after = with_score_changes(base.before, after)
    behaved = base.asked.compared_with(tuned, tokenizer) if base.asked else None
    change = changes(base.before, after)
    answered = run_keys(behaved)
    bounded = {bound.name for bound in asked.bounds}
    lines = answered.pop("not_judged", None) or []
    said = [line for line in lines if not bounded.isdisjoint(names_not_judged(line))]
    not_judged = [*asked.left_out, *said]
    return CheckedRun(
        configuration=as_dict(options),
        environment=environment(str(next(tuned.parameters()).device)),
        before=base.before,
        after=after,
        forgetting=change.forgetting,
        general=change.general,
        divergence_by_kind=divergence_by_kind(after.own),
        not_judged=not_judged or None,
        **answered,
    )


def _write_all(options: CheckOptions, run: CheckedRun) -> None:
    """Write run.json first, which holds the verdicts, then what is made of it."""
    if options.out is None:
        return
    out = Path(options.out)
    write_record(out / "run.json", run)
    write_text(out / "junit.xml", gate_junit(run))
    write_text(out / "summary.md", gate_markdown(run))
    write_report(as_comparison(run, out / "run.json"), out / "report.html")
    logger.info("wrote run.json, junit.xml, summary.md and report.html to %s", out)
