"""What an experiment cannot be run with, said before anything is loaded: OptionError for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from forgetless.compare.experiment import Experiment, SequenceSpec, record_options, tune_options
from forgetless.errors import OptionError, brief, nearest
from forgetless.options.option import MEASURED, deciding, parse_rule
from forgetless.options.tune import TuneOptions

# Options of `tune` that the experiment itself sets: its model, data and seeds, what is measured,
# and the folders of its runs.
OURS = {
    "model",
    "data",
    "seed",
    "columns",
    "earlier",
    "eval_steps",
    "out",
    "resume",
    "overwrite",
    "against_plain",
    "push_to_hub",
    "private",
    *deciding(TuneOptions, MEASURED),
}
# How general text is read: said once for --replay too, which is a method's own.
OURS -= {"text_column", "general_split"}
# What makes a method.
SETTINGS = {"importance", "method", "replay"}


def check_experiment(path: Any, experiment: Experiment) -> None:
    """Raise OptionError for the first thing that is wrong; `path` stands in messages."""
    _check_texts(path, experiment)
    _check_counts(path, experiment)
    _check_levels(path, experiment)
    _check_trials(path, experiment)
    for name, spec in experiment.sequences.items():
        _check_sequence(path, experiment, name, spec)
    for label, recipe in experiment.importance.items():
        with _named(path, f"importance: {label}"):
            record_options(experiment, recipe, general="x", out="x")
    for label, method in experiment.methods.items():
        for settings in method.settings():
            with _named(path, f"methods: {label}"):
                _options_of(experiment, settings)


def _check_texts(path: Any, experiment: Experiment) -> None:
    """Two general texts, or what the model says itself, and a plain method to measure learning
    by.
    """
    if len(experiment.general) < 2 and not experiment.asking:
        raise OptionError(
            f"{path}: general: expected at least two texts, of the recorded kind and of another, "
            f"found {len(experiment.general)}: "
            "what is kept may be just what was recorded; or `chat`, the model's own answers"
        )
    if not any(method.options["method"] == "plain" for method in experiment.methods.values()):
        raise OptionError(
            f"{path}: methods: none is plain fine-tuning, which learning is measured by; add "
            f"`plain: {{grid: {{learning_rate: [...]}}}}`"
        )


def _check_counts(path: Any, experiment: Experiment) -> None:
    """Seeds and limits are whole numbers, and there is a seed to choose settings with."""
    for part, seeds in experiment.seeds.items():
        if not isinstance(seeds, list) or not all(_is_count(seed, 0) for seed in seeds):
            raise OptionError(
                f"{path}: seeds: {part} expects a list of whole numbers from 0, found "
                f"{brief(seeds)}"
            )
    limits: dict[str, Any] = {f"limit: {part}": limit for part, limit in experiment.limit.items()}
    for key in ("characters", "answers", "answer_length"):
        limits[key] = getattr(experiment, key)
    for what, value in limits.items():
        if value is not None and not _is_count(value, 1):
            raise OptionError(
                f"{path}: {what} expects a whole number above 0, found {brief(value)}"
            )
    if not experiment.seeds.get("validation"):
        raise OptionError(
            f"{path}: seeds: settings are chosen on the validation part, which needs at least "
            "one seed; add `validation: [0]`"
        )


def _check_levels(path: Any, experiment: Experiment) -> None:
    """Levels of learning and scales lie within their bounds, and nothing is set twice."""
    if not experiment.shares or not all(0 < level <= 1 for level in experiment.shares):
        raise OptionError(
            f"{path}: shares are of plain fine-tuning's learning: expected some between 0 and 1, "
            f"found {list(experiment.shares)}"
        )
    if wrong := [key for key in experiment.training if key in (OURS | SETTINGS)]:
        raise OptionError(
            f"{path}: training: '{wrong[0]}' is set by the "
            f"{'experiment itself' if wrong[0] in OURS else 'methods'}; leave it out"
        )
    if set(experiment.seeds.get("validation", [])) & set(experiment.seeds.get("test", [])):
        raise OptionError(
            f"{path}: seeds: the test part needs fresh seeds, found {experiment.seeds}"
        )
    if not all(0 < scale < 1 for scale in experiment.scales):
        raise OptionError(
            f"{path}: scales lie between 0 and 1 (1 is always evaluated), found "
            f"{list(experiment.scales)}"
        )


def _check_trials(path: Any, experiment: Experiment) -> None:
    """Every method has as many tries, and no task is a domain."""
    counts = {label: len(method.settings()) for label, method in experiment.methods.items()}
    if experiment.trials != "free" and len(set(counts.values())) > 1:
        raise OptionError(
            f"{path}: methods have unequal numbers of trials "
            f"({', '.join(f'{k} {n}' for k, n in counts.items())}): the one with more tries has "
            "an advantage. Give each as many, or `trials: free`, which the verdict will say"
        )
    if both := set(experiment.tasks) & set(experiment.domains):
        raise OptionError(
            f"{path}: tasks: '{min(both)}' is a domain; put its questions there, as `task`"
        )


def _check_sequence(path: Any, experiment: Experiment, name: str, spec: SequenceSpec) -> None:
    """Raise OptionError for domains and methods that the experiment does not have, and for what a
    sequence cannot be run with.
    """
    where = f"{path}: sequences: {name}"
    if len(spec.domains) < 2 or len(set(spec.domains)) < len(spec.domains):
        raise OptionError(
            f"{where}: expected two or more different domains, found "
            f"{', '.join(spec.domains) or 'none'}"
        )
    for domain in spec.domains:
        if domain not in experiment.domains:
            raise OptionError(
                f"{where}: unknown domain '{domain}'; {nearest(domain, experiment.domains)}"
            )
    for label, over in spec.methods.items():
        _check_sequence_method(path, experiment, name, label, over)
    if experiment.model.get("quantize", "none") != "none":
        raise OptionError(
            f"{where}: each step is merged into the weights, which quantize does not allow; "
            "leave out one of them"
        )
    if not experiment.seeds.get("test"):
        raise OptionError(f"{where}: sequences are measured on the test parts; give test seeds")


def _check_sequence_method(
    path: Any, experiment: Experiment, name: str, label: str, over: Mapping[str, Any]
) -> None:
    where = f"{path}: sequences: {name}"
    if (like := str(over.get("like", label))) not in experiment.methods:
        raise OptionError(
            f"{where}: unknown method '{like}'; {nearest(like, experiment.methods)}, or "
            f"`{label}: {{like: plain, method: ...}}`"
        )
    if wrong := [key for key in over if key in OURS]:
        raise OptionError(
            f"{where}: {label}: '{wrong[0]}' is set by the experiment itself; leave it out"
        )
    laid = {key: value for key, value in over.items() if key != "like"}
    settings = {**experiment.methods[like].settings()[0], **laid}
    with _named(path, f"sequences: {name}: {label}"):
        _options_of(experiment, settings)
        if settings.get("consolidate"):
            parse_rule(settings["consolidate"])


def _options_of(experiment: Experiment, settings: Mapping[str, Any]) -> TuneOptions:
    return tune_options(experiment, settings, data="x", replay="x", importance="x", out="x", seed=0)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 32


@contextlib.contextmanager
def _named(path: Any, where: str) -> Iterator[None]:
    """Say where an option stands that is wrong."""
    try:
        yield
    except OptionError as error:
        raise OptionError(f"{path}: {where}: {error}") from None
