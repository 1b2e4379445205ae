"""shrink(): a finished adapter, whoever trained it with PEFT, made to keep a forgetting budget;
along importance or by plain scaling.

The story: refuse what cannot be shrunk, measure the bare base on the general text, shrink by more
and less, take the most learning that keeps the budget on the control part, check it once on the
other part, write. Plain scaling is measured beside it at the same budget. The input is never
written to.

    DIR/final/      the adapter, same rank and configuration; loads with plain PEFT
    DIR/run.json    configuration, before, after, budget with verdict, the curve of each way

Along a way, the fraction 1 is the adapter as it came and 0 the base (ways.py).

    forgetless shrink their-adapter --importance model.importance.safetensors --budget 1% \\
        --general held-out.jsonl --data domain.jsonl --out shrunk
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.budget.baseline import Baseline, answers_baseline, measure_baseline
from forgetless.budget.budget import check_reach, parse
from forgetless.budget.finish import keep_budget, keep_predicted
from forgetless.budget.learning import Learning, domain
from forgetless.budget.predicted import Forecast, check_calibrated
from forgetless.budget.scan import EACH
from forgetless.budget.shrinkable import SHRINK_WRITES, check_shrink, is_of_factors
from forgetless.budget.ways import Ways, fraction_of, ways_of
from forgetless.data.domain import encode_rows
from forgetless.data.inputs import HeldOut, read_held_out
from forgetless.errors import OptionError
from forgetless.evaluate.evaluate import changes, changes_table, measure
from forgetless.evaluate.paired_answers import PairedAnswers, paired_part
from forgetless.files.budget_json import BudgetReport
from forgetless.files.hub import importance_path
from forgetless.files.lock import only_writer
from forgetless.files.measured_json import Measured
from forgetless.files.outputs import claim, local_inputs
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.room import check_free_space
from forgetless.files.run_json import ImportanceUsed, Run, ShrunkRun
from forgetless.files.schema import as_record, plain_of, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.importance.importance import Importance
from forgetless.importance.recorded_on import check_recorded_text
from forgetless.model.adapter_files import load_tuned
from forgetless.model.adapter_path import AdapterPath
from forgetless.model.adapter_tokenizer import tuned_tokenizer
from forgetless.model.adapters import bare
from forgetless.model.loading import save_whole, seed_and_threads
from forgetless.model.update import Update
from forgetless.options.finished import ShrinkOptions
from forgetless.options.option import as_dict
from forgetless.penalty.fit import check_fit
from forgetless.penalty.pull import Penalty
from forgetless.report.budget import curve_table, sentences
from forgetless.report.cards import write_card

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Loaded:
    """What is shrunk, and by what: the base model with the adapter, and importance where given."""

    tokenizer: Any
    model: nn.Module
    update: Update | AdapterPath
    importance: Importance | None
    ways: Ways


@dataclass(frozen=True)
class BaseLosses:
    """What the bare base model loses: on everything that is measured, and where a budget is to be
    kept, on the parts that it is kept by; `own` is what it says itself.
    """

    before: Measured
    learning: Learning | None
    baseline: Baseline | None
    own: PairedAnswers | None


def shrink(options: ShrinkOptions) -> JsonObject:
    """Shrink as `options` say; writes `options.out` and returns what is in its run.json.

    Raises ValueError or OptionError before anything is written.
    """
    options = _with_model(options, check_shrink(options))
    with only_writer(options.out):
        claim(options.out, "shrink", SHRINK_WRITES, local_inputs(options))
        return _shrink_into_folder(options)


def _shrink_into_folder(options: ShrinkOptions) -> JsonObject:
    """The adapter shrunk and measured; what is in its run.json."""
    file = importance_path(options.importance) if options.importance else None
    importance = Importance.load(file) if file else None
    if options.budget and not options.general:
        check_calibrated(importance)
    seed_and_threads(options)
    started = time.perf_counter()
    out = Path(options.out)
    held_out = _held_out(options)
    check_recorded_text(options, importance, held_out.general)
    loaded = _load_adapter(options, importance)
    base = _measure_base(options, loaded, held_out)
    report = _shrunk(options, loaded, base)
    save_whole(loaded.model, loaded.tokenizer, out / "final")
    after = measure(loaded.model, loaded.tokenizer, held_out, own=base.own)
    change = changes(base.before, after)
    run = ShrunkRun(
        configuration=as_dict(options),
        environment=environment(str(next(loaded.model.parameters()).device)),
        importance=ImportanceUsed(options.importance, sha256_file(file)) if file else None,
        before=base.before,
        after=after,
        forgetting=change.forgetting,
        learning=change.learning,
        general=change.general,
        budget=report,
        verdict=None if report is None else report.verdict,
        seconds=time.perf_counter() - started,
    )
    write_card(out / "final", "shrink", as_record(run, Run))
    write_record(out / "run.json", run)
    if held_out.anything:
        print(changes_table(base.before, after))
    if report is not None:
        print("\n".join([curve_table(report), *sentences(report)]))
    logger.info("wrote %s in %.0f s", out / "final", run.seconds)
    return plain_of(run)


def _with_model(options: ShrinkOptions, base: str | None) -> ShrinkOptions:
    """The options with the base model, named by the adapter's configuration where they do not."""
    options = replace(options, model=options.model or base or "")
    if not options.model:
        raise OptionError(f"'{options.adapter}' does not name its base model; give --model MODEL")
    return options


def _held_out(options: ShrinkOptions) -> HeldOut:
    return read_held_out(
        options,
        data=options.data,
        data_split=options.data_split,
        columns=options.columns,
        limit=options.limit,
    )


def _load_adapter(options: ShrinkOptions, importance: Importance | None) -> Loaded:
    """The adapter on its base model. Raises ValueError where the importance does not fit it, or the
    result does not fit on the disk.
    """
    tokenizer = tuned_tokenizer(options, options.adapter)
    model = load_tuned(options, options.adapter)
    update: Update | AdapterPath
    if is_of_factors(options.adapter):
        update = Update(model)
        if importance is not None:
            check_fit(model, importance, [weight.name for weight in update.weights], "base")
        ways = ways_of(update, importance)
    else:
        update = AdapterPath(model)
        ways = {"scale": update.scale}
    parameters = update.parameters
    check_free_space(Path(options.out), sum(p.numel() * p.element_size() for p in parameters))
    logger.info(
        "%s %s (%d tensors on %s)",
        options.method,
        options.adapter,
        len(parameters),
        options.model,
    )
    return Loaded(tokenizer, model, update, importance, ways)


def _measure_base(options: ShrinkOptions, loaded: Loaded, held_out: HeldOut) -> BaseLosses:
    """Measure the bare base model, under the adapter that is switched off for as long."""
    tokenizer = loaded.tokenizer
    with bare(loaded.model) as base:
        own = paired_part(base, tokenizer, held_out.own, "check")
        before = measure(base, tokenizer, held_out, own=own, is_base=True)
        learning = baseline = None
        if options.budget and held_out.domain is not None:
            learning = domain(base, encode_rows(held_out.domain, tokenizer), options.data or "")
        budget = parse(options.budget) if options.budget else None
        if budget and held_out.own:
            baseline = answers_baseline(base, tokenizer, held_out.own, budget, check=own)
        elif budget and held_out.general:
            baseline = measure_baseline(base, tokenizer, held_out.general, budget)
    return BaseLosses(before, learning, baseline, own)


def _shrunk(options: ShrinkOptions, loaded: Loaded, base: BaseLosses) -> BudgetReport | None:
    """Make the update smaller: by what the budget allows, measured or predicted, and the report on
    that; else by the mu that was given.
    """
    model = loaded.model
    if not options.budget:
        assert options.mu is not None
        loaded.ways[options.method](fraction_of(options.mu, options.method))
        return None
    if base.baseline is not None:
        spread = base.baseline.spread(model, loaded.update, error=EACH)
        documents = len(base.baseline.check)
        check_reach(spread.rise, documents, base.baseline.budget, error=EACH)
        among = (options.method,)
        return keep_budget(base.baseline, model, loaded.ways, base.learning, among=among)
    calibration = check_calibrated(loaded.importance)
    assert loaded.importance is not None and isinstance(loaded.update, Update)
    gauge = Penalty(model, loaded.importance, strength=0.0)
    forecast = Forecast(parse(options.budget), calibration, gauge)
    return keep_predicted(forecast, model, {"scale": loaded.update.scale}, base.learning)
