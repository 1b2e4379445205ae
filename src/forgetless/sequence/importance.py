"""Importance of a domain that was just learned: recorded by the estimator and in the form of what
there is so far, and consolidated with it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from forgetless.data.documents import fingerprint_rows
from forgetless.data.domain import encode_rows, load_training_data
from forgetless.importance.consolidate import consolidated
from forgetless.importance.importance import Importance
from forgetless.importance.info import TextSource
from forgetless.model.loading import context_length, load_tokenizer, seed_and_threads
from forgetless.options.estimators import known, unread
from forgetless.options.model import ModelOptions, TextOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record import state as recording_state
from forgetless.record.recording import record_on
from forgetless.record.state import CalibratedState
from forgetless.record.text import RecordingText

logger = logging.getLogger("forgetless")


def consolidate(
    so_far: str,
    learned: str,
    split: str | None,
    model: Callable[[], nn.Module],
    options: TuneOptions,
    out: Path,
) -> str:
    """The file that the next step is held by:

    `so_far` with the importance of the rows of `learned`, by `options.consolidate`, written to
    `out`.

    `split` of a Hub dataset (None: that of the options). `model` gives the model that has learned
    them. Uniform importance is the same whatever was learned, and is given back as it is. The
    domain's own importance stays beside `out` as domain.safetensors, where it is found again.
    """
    rule = options.consolidate or "sum"
    if rule == "none":
        return so_far
    old = Importance.load(so_far)
    estimator = known(old.info.get("estimator"))
    if estimator is not None and estimator.constant:
        return so_far
    last = _recorded(
        old,
        learned,
        split or options.data_split,
        model,
        options,
        out.with_name("domain.safetensors"),
    )
    # The base is the same, so what it says of general ability is held to as before.
    both = dataclasses.replace(consolidated(old, last, rule), answers=old.answers)
    error = both.info["consolidated"][-1]["error"]
    logger.info(
        "importance of %s consolidated with that before (%s): relative error %.3f at the median "
        "weight, %.3f at most",
        learned,
        rule,
        error["median"],
        error["largest"],
    )
    both.save(out)
    return str(out)


def _recorded(
    like: Importance,
    learned: str,
    split: str,
    model: Callable[[], nn.Module],
    options: TuneOptions,
    out: Path,
) -> Importance:
    """Importance of what is scored in the rows of `learned`, by the estimator and in the form of
    `like`.
    """
    if out.exists():
        return Importance.load(out)
    recipe = recipe_of(like, options, str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    state = recording_state.load_state(recipe)
    seed_and_threads(options)
    tokenizer, taught = load_tokenizer(options), model()
    rows = list(load_training_data(learned, split=split))[: recipe.documents]
    length = min(recipe.length or 1024, context_length(taught))
    encoded = [
        (ids[-length:], scored[-length:])
        for ids, scored in encode_rows(
            rows, tokenizer, completion_only=options.completion_only is not False
        )
    ]
    encoded = [row for row in encoded if any(row[1][1:])]
    source = TextSource(
        source=learned,
        documents=len(rows),
        tokens=sum(len(ids) for ids, _ in encoded),
        sha256=fingerprint_rows(rows),
    )
    assert not isinstance(state, CalibratedState)  # the recipe does not calibrate
    return record_on(recipe, taught, tokenizer, RecordingText(encoded, source), state)


def recipe_of(importance: Importance, options: TuneOptions, out: str) -> RecordOptions:
    """The options by which importance of another text is recorded as `importance` was, on the model
    of `options`.
    """
    name, tier = str(importance.info.get("estimator")), importance.tier
    estimator = known(name)
    trains = estimator is not None and estimator.trains
    options_of_record = {field.name for field in dataclasses.fields(RecordOptions)}
    text = {field.name for field in dataclasses.fields(TextOptions)}
    unused = {"out", "calibrate", "cov_rank", "tier", "keep_anchor", "keep_answers"}
    unused |= {*text, *unread(name)}
    if not trains:
        unused.add("preset")
    given = {
        key: value
        for key, value in importance.info.get("settings", {}).items()
        if key in options_of_record - unused
    }
    kind, _, rank = tier.partition(":")
    if kind == "kronecker" and estimator is not None and estimator.tier == kind:
        given["cov_rank"] = int(rank or 0)
    else:
        given["tier"] = tier
    mine = {field.name: getattr(options, field.name) for field in dataclasses.fields(ModelOptions)}
    mine.update(quantize="none", resume=options.resume, out=out)
    keep = {"keep_anchor": False} if trains else {}
    return resolve(RecordOptions, {**given, **mine, **keep, "estimator": name})
