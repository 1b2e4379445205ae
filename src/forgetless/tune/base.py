"""The bare base model: loaded as it is, and measured before an adapter is on it.

    base = load_base(options, tokenizer, given)
    start = measure_start(options, base, inputs, rows, earlier)
    start.setup.before.general.nats      # what the base loses on general text

What was forgotten or learned is counted from here. With a budget, the keeper makes its own
measurements on the same base, and methods that replay text sample or read it here.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from forgetless.budget.keeper import Keeper
from forgetless.budget.open import of_run, on_earlier
from forgetless.budget.predicted import Predictor, check_calibrated
from forgetless.data.inputs import Inputs
from forgetless.data.own_text import KEPT
from forgetless.evaluate.conversations import AskedBase, ask_base
from forgetless.evaluate.domain_form import completions_of
from forgetless.evaluate.evaluate import measure
from forgetless.evaluate.own_answers import OWN_WORDS, default_kind
from forgetless.evaluate.paired_answers import PairedAnswers, paired_part
from forgetless.files.cache import cache_folder
from forgetless.files.hub import importance_path
from forgetless.files.run_json import ReplayedText
from forgetless.importance.controls import uniform
from forgetless.importance.importance import Importance
from forgetless.methods.method import Setup
from forgetless.methods.replay_text import replay_text
from forgetless.model.loading import load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.model.stages import Earlier
from forgetless.options.estimators import default_strength
from forgetless.options.holding import AUTO
from forgetless.options.methods import METHODS, budget_pulls, method_names
from forgetless.options.tune import TuneOptions
from forgetless.penalty.layers import from_option
from forgetless.record.cached import default_recording, recorded_for
from forgetless.tune.checks import check_model
from forgetless.tune.rows import Rows, tokens_per_step

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class LoadedBase:
    """The model as it was loaded, what it is held by, and how hard layer by layer."""

    model: nn.Module
    tokenizer: Any
    importance: Importance | None
    file: Path | None  # where the importance lies
    layers: Any  # one of penalty/layers.py


@dataclass(frozen=True)
class Start:
    """The model that training starts from, measured.

    `setup` is what methods may read, `keeper` what keeps a budget, `own` what the base says itself
    and the tuned model is measured on, `asked` what it said to the prompts that behaviours are
    compared on, `replayed` where the replayed text came from (for run.json), and `seconds` what it
    took to read or sample that text.
    """

    model: nn.Module
    setup: Setup
    keeper: Keeper | Predictor | None
    own: PairedAnswers | None
    asked: AskedBase | None
    replayed: ReplayedText | None
    seconds: float


def load_importance(options: TuneOptions) -> tuple[Importance | None, Path | None]:
    """The importance that --importance names and where its file lies; (None, None) without it, and
    where it is to be found for the model once that is loaded.

    Raises OptionError where a budget is to be kept on a prediction that it cannot make.
    """
    importance = path = None
    if options.importance == AUTO:
        cache_folder("importance")
    elif options.importance:
        path = importance_path(options.importance)
        importance = Importance.load(path)
    if options.budget and not options.general:
        check_calibrated(importance)
    return importance, path


def importance_name(options: TuneOptions, file: Path | None) -> str | None:
    """What the importance is called: as it was given, or by its file where it was found."""
    return str(file) if options.importance == AUTO and file else options.importance


def with_strength(options: TuneOptions, importance: Importance | None) -> TuneOptions:
    """The options with the strength that suits the importance, where none was given and no budget
    sets it.
    """
    if importance is None or options.strength is not None or options.budget:
        return options
    rows = [METHODS[name] for name in method_names(options.method)]
    if not any("strength" in (*row.needs, *row.reads) for row in rows):
        return options
    return replace(options, strength=default_strength(importance.info.get("estimator", "?")))


def measured_on_own(options: TuneOptions, tokenizer: Any) -> TuneOptions:
    """The options with what forgetting is measured on, where that is what the model says itself."""
    if options.general != AUTO:
        return options
    kind = default_kind(tokenizer)
    logger.info(
        "what is lost is measured on %s; --general TEXT measures it on a text of yours, and "
        "--general none not at all",
        OWN_WORDS[kind],
    )
    return replace(options, general=kind)


def load_base(
    options: TuneOptions, tokenizer: Any, importance: Importance | None, file: Path | None
) -> LoadedBase:
    """Load the model and refuse what does not fit it; `importance` of `file`, as given.

    Where it is to be found it comes from the cache, or is recorded now. With a budget and without
    importance, all weights are held alike.
    """
    layers = from_option(options.layers, tau=options.tau, per=options.per)
    set_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_to_train(options)
    if options.importance == AUTO:
        importance, file = _found_or_recorded(options, model, tokenizer)
    elif options.budget and importance is None and budget_pulls(options.method):
        logger.warning(
            "no --importance file: the budget is kept with uniform importance, which holds all "
            "weights alike"
        )
        importance = uniform(model, options.targets)
    check_model(options, model, importance, layers)
    if options.quantize != "none":
        # This turns norms and embeddings to f32. It stands before the first measurement, so that
        # the difference does not look like forgetting.
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=options.gradient_checkpointing
        )
    return LoadedBase(model, tokenizer, importance, file, layers)


def _found_or_recorded(
    options: TuneOptions, model: nn.Module, tokenizer: Any
) -> tuple[Importance, Path]:
    """The importance of this base from the cache, or recorded now.

    Raises ValueError where that cannot be, with what to do instead.
    """
    try:
        found = recorded_for(default_recording(options, tokenizer), model, tokenizer)
    except ValueError as error:
        raise ValueError(
            f"the importance of {options.model} is not in the cache and cannot be recorded: "
            f"{error}. Give --importance FILE of another recording, or --method plain, which "
            "tunes without holding"
        ) from error
    set_seed(options.seed)  # what follows is the same, recorded now or before
    return found


def file_in_cache(options: TuneOptions) -> Path:
    """Where the cache has the importance of a base, which is loaded and where needed recorded."""
    tokenizer = load_tokenizer(options)
    return _found_or_recorded(options, load_to_train(options), tokenizer)[1]


def measure_start(
    options: TuneOptions, base: LoadedBase, inputs: Inputs, rows: Rows, earlier: Earlier | None
) -> Start:
    """Measure the model that training starts from: the base, or with `earlier` the base with the
    updates of a sequence's earlier steps merged into it.
    """
    model, tokenizer, baseline = base.model, base.tokenizer, None
    own = paired_part(model, tokenizer, inputs.held_out.own, "check")
    asked = ask_base(model, tokenizer, options, completions_of(inputs.training))
    if earlier is not None:
        # Under the adapter lies what the earlier steps made of the base.
        own = None if own is None else own.by_stored()
        model, baseline = on_earlier(
            options, earlier, model, tokenizer, inputs.held_out, rows.training
        )
    started = time.perf_counter()
    kept = base.importance.answers if base.importance is not None else None
    replayed = replay_text(options, inputs.replay, model, tokenizer, rows.training, kept)
    seconds = time.perf_counter() - started
    before = measure(model, tokenizer, inputs.held_out, own=own, is_base=earlier is None)
    keeper = None
    if options.budget:
        keeper = of_run(
            options, model, tokenizer, inputs, rows.training, base.importance, baseline, own
        )
    setup = Setup(
        options,
        tokenizer,
        replayed.sequences,
        tokens_per_step(options, rows.training),
        base.importance,
        base.layers,
        before,
        stored=kept.stored if kept and options.replay == KEPT else None,
        kinds=replayed.kinds,
    )
    return Start(model, setup, keeper, own, asked, replayed.source, seconds)
