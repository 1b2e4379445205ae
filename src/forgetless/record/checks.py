"""What can be refused before a model is loaded: options that don't go together."""

from __future__ import annotations

from dataclasses import fields

from forgetless.data.own_text import own_text
from forgetless.errors import OptionError
from forgetless.importance.tiers import parse_tier
from forgetless.model import distributed
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.model import OWN_TEXT_OPTIONS, ModelOptions
from forgetless.options.option import RUNNING, deciding, flag
from forgetless.options.record import RecordOptions
from forgetless.options.verbs import resolve


def check_record_options(options: RecordOptions) -> None:
    """Raise OptionError where an option cannot be had with the others, or with the processes that
    were started.
    """
    if options.tier:
        _check_tier(options.tier, options.estimator)
    if options.private is not None and not options.push_to_hub:
        raise OptionError("--private is for --push-to-hub NAME, which is not given")
    constant = ESTIMATORS[options.estimator].constant
    named = options.general and own_text(options, options.general) is None
    if options.keep_answers and (constant or named):
        raise OptionError(
            "--keep-answers keeps answers of the model that are recorded on, found "
            + (f"--general {options.general}" if named else f"--estimator {options.estimator}")
            + "; give --general chat or self"
        )
    if options.calibrate:
        _check_calibrate(options.estimator)
    if not options.out:
        _check_for_the_cache(options)


def _check_tier(tier: str, estimator: str) -> None:
    kind, _ = parse_tier(tier)
    if kind == "kronecker" and ESTIMATORS[estimator].tier != kind:
        raise OptionError(
            f"--tier {tier} needs --estimator kronecker, found --estimator {estimator}"
        )


def _check_calibrate(estimator: str) -> None:
    if ESTIMATORS[estimator].constant:
        raise OptionError(
            f"--calibrate measures what energy costs, which with --estimator {estimator} "
            "is the size of the update alone; use another estimator"
        )
    if distributed.world_size() > 1:
        raise OptionError(
            f"--calibrate trains in one process, found {distributed.world_size()}; record without "
            "torchrun"
        )


def decided_by_tune() -> set[str]:
    """The options that a recording in the cache may be given: those that `tune` has too, and those
    that decide nothing.
    """
    of_models = {field.name for field in fields(ModelOptions)} - {"seed"}
    return {*of_models, *OWN_TEXT_OPTIONS, *deciding(RecordOptions, RUNNING)}


def _check_for_the_cache(options: RecordOptions) -> None:
    """Raise OptionError where a recording that `tune` would not look for has no file to go to."""
    usual = resolve(RecordOptions, {"model": options.model})
    free = decided_by_tune()
    others = [
        flag(field.name)
        for field in fields(RecordOptions)
        if field.name not in free and getattr(options, field.name) != getattr(usual, field.name)
    ]
    if others:
        raise OptionError(
            "missing --out: without it the file goes into the cache, where tune looks for what is "
            f"recorded by default; found {', '.join(others)}; for example: --out "
            "model.importance.safetensors"
        )
