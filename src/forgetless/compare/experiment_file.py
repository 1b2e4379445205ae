"""The YAML file of an experiment: read with its base, checked, made an Experiment (experiment.py).

Nothing heavy is imported.

    model: Qwen/Qwen3-0.6B
    general:                                  # the first is what importance is recorded on,
                                              replayed and held by KL; the others are only measured
      wiki: {text: wiki.jsonl, test: wiki-held-out.jsonl}
      code: {text: code.jsonl}
    domains:
      medicine: {data: medicine.jsonl, test: medicine-test.jsonl}
    training: {max_steps: 300, batch_size: 8, length: 512}          # options of `forgetless tune`
    importance:
      default: {documents: 500}                                     # options of `forgetless record`
    methods:
      plain: {grid: {learning_rate: [3.0e-4, 1.0e-3, 3.0e-3]}}
      forgetless: {importance: default, learning_rate: 3.0e-3, grid: {strength: [3, 10, 30]}}
      kl: {method: kl, replay: recorded, learning_rate: 1.0e-3, grid: {kl_weight: [0.3, 1, 3]}}
    seeds: {validation: [0], test: [1, 2, 3]}

`base: other.yaml` starts from another file; mappings are merged, null removes a key.
docs/compare.md tells the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.compare.experiment import (
    Experiment,
    MethodSpec,
    SequenceSpec,
    record_options,
    tune_options,
)
from forgetless.errors import FileError, OptionError, brief, nearest
from forgetless.files.untrusted import check_mapping, check_name
from forgetless.options.methods import FAMILIES
from forgetless.options.methods import family as family_of
from forgetless.options.option import MEASURED, deciding, parse_rule, read_yaml
from forgetless.options.tune import TuneOptions

# Options of `tune` that the experiment itself sets: its model, data and seeds, what is measured,
# and the folders of its runs.
OURS = {
    "model",
    "data",
    "seed",
    "earlier",
    "eval_steps",
    "out",
    "resume",
    "overwrite",
    "push_to_hub",
    "private",
    *deciding(TuneOptions, MEASURED),
}
# How general text is read: said once for --replay too, which is a method's own.
OURS -= {"text_column", "general_split"}
SETTINGS = {"importance", "method", "replay"}  # what makes a method
MOST_SETTINGS = 10_000  # of one method
KNOWN = {f.name for f in dataclasses.fields(Experiment)} | {
    "base",
    "dtype",
    "device",
    "revision",
    "quantize",
    "threads",
    "trust_remote_code",
}


def read(path: str | Path) -> Experiment:
    """The experiment in a YAML file.

    Raises OptionError for unknown keys, missing parts, wrong options, and an unequal number of
    trials.
    """
    try:
        return _read(path)
    except FileError as error:
        raise error if isinstance(error, OptionError) else OptionError(str(error)) from None


def _read(path: str | Path) -> Experiment:
    given = _with_base(Path(path))
    for key in given:
        if key not in KNOWN:
            raise OptionError(f"{path}: unknown key '{key}'; {nearest(key, KNOWN)}")
    for key in ("model", "general", "domains", "methods"):
        if not given.get(key):
            raise OptionError(f"{path}: missing '{key}'; see docs/compare.md")
    model = {
        key: given[key]
        for key in (
            "model",
            "dtype",
            "device",
            "revision",
            "quantize",
            "threads",
            "trust_remote_code",
        )
        if given.get(key) is not None
    }
    parts = {
        key: _named_parts(f"{path}: {key}", given.get(key))
        for key in ("general", "domains", "methods", "importance", "sequences", "tasks")
    }
    importance = {
        label: check_mapping(recipe, f"{path}: importance: {label}")
        for label, recipe in parts["importance"].items()
    }
    methods = {
        label: _method(label, check_mapping(spec, f"{path}: methods: {label}"), importance)
        for label, spec in parts["methods"].items()
    }
    rest: dict[str, Any] = {
        key: given[key] for key in ("trials", "characters") if given.get(key) is not None
    }
    rest["training"] = check_mapping(given.get("training"), f"{path}: training")
    rest.update(
        {
            key: tuple(map(float, _numbers(given[key], f"{path}: {key}")))
            for key in ("scales", "shares")
            if given.get(key) is not None
        }
    )
    rest["sequences"] = {
        name: _sequence(path, name, spec) for name, spec in parts["sequences"].items()
    }
    known = {"seeds": ("validation", "test"), "limit": ("validation", "test", "questions")}
    rest.update(
        {
            key: check_mapping(given[key], f"{path}: {key}", names)
            for key, names in known.items()
            if given.get(key) is not None
        }
    )
    rest["tasks"] = {name: str(spec) for name, spec in parts["tasks"].items()}
    found = Experiment(
        title=str(given.get("title") or Path(path).stem),
        model=model,
        importance=importance,
        methods=methods,
        general={
            name: _place(path, "general", name, value, "text")
            for name, value in parts["general"].items()
        },
        domains={
            name: _place(path, "domains", name, value, "data")
            for name, value in parts["domains"].items()
        },
        **rest,
    )
    _check(path, found)
    return found


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a file laid over that of its base.

    Keys of methods and domains are kept as written.
    """
    if path.resolve() in above:
        raise OptionError(f"{path}: its base leads back to itself")
    given = read_yaml(path)
    base = given.pop("base", None)
    return (
        _merged(_with_base(path.parent / str(base), (*above, path.resolve())), given)
        if base
        else given
    )


def _merged(
    below: dict[str, Any], above: dict[str, Any], where: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Null removes a key; a method of a sequence that is not there yet is one without options of
    its own.
    """
    merged = dict(below)
    for key, value in above.items():
        if value is None and (
            key in merged or len(where) != 3 or where[::2] != ("sequences", "methods")
        ):
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value, (*where, key))
        else:
            merged[key] = value
    return merged


def _place(path: Any, where: str, name: str, value: Any, main: str) -> dict[str, str]:
    """{main, test} of a text or a domain, which may be given as the one file alone."""
    given = (
        {main: value}
        if isinstance(value, str)
        else check_mapping(value, f"{path}: {where}: {name}")
    )
    known = (main, "test", "task") if where == "domains" else (main, "test")
    if set(given) - set(known) or not given.get(main):
        raise OptionError(
            f"{path}: {where}: {name} expects {main} (and {', '.join(known[1:])}), found "
            f"{', '.join(map(str, given)) or 'nothing'}"
        )
    if not all(isinstance(item, str) for item in given.values()):
        raise OptionError(
            f"{path}: {where}: {name} expects names of files or data sets, found "
            f"{', '.join(map(brief, given.values()))}"
        )
    return given


def _named_parts(where: str, value: Any) -> dict[str, Any]:
    """A mapping whose keys become names of files and folders, and stand in tables."""
    if isinstance(value, Mapping):
        for key in value:
            check_name(key, where)
    return check_mapping(value, where)


def _numbers(value: Any, where: str) -> list[Any]:
    """A list of finite numbers. Raises FileError."""
    if not isinstance(value, list) or not all(
        isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
        for item in value
    ):
        raise FileError(
            f"{where}: expected a list of numbers, found "
            f"{brief(value) if not isinstance(value, list) else 'other values in it'}"
        )
    return value


def _method(label: str, spec: dict[str, Any], importance: Mapping[str, Any]) -> MethodSpec:
    lists = check_mapping(spec.pop("grid", None), f"methods: {label}: grid")
    grid = {
        key.replace("-", "_"): list(values) if isinstance(values, (list, tuple)) else [values]
        for key, values in lists.items()
    }
    if not 0 < math.prod(map(len, grid.values())) <= MOST_SETTINGS:
        raise OptionError(
            f"methods: {label}: the grid has {math.prod(map(len, grid.values()))} settings, "
            f"expected 1 to {MOST_SETTINGS}"
        )
    options = {key.replace("-", "_"): value for key, value in spec.items()}
    options.setdefault("method", "hold" if options.get("importance") else "plain")
    family = str(options.pop("family", family_of(str(options["method"]))))
    if family not in FAMILIES:
        raise OptionError(
            f"methods: {label}: unknown family '{family}'; {nearest(family, FAMILIES)}"
        )
    for key in (*options, *grid):
        if key in OURS:
            raise OptionError(
                f"methods: {label}: '{key}' is set by the experiment itself; leave it out"
            )
    for name in map(str, filter(None, (options.get("importance"), *grid.get("importance", ())))):
        if name not in importance:
            raise OptionError(
                f"methods: {label}: unknown importance '{name}'; "
                f"{nearest(name, importance or ['none'])}"
            )
    return MethodSpec(label, options, grid, family)


def _sequence(path: Any, name: str, spec: Any) -> SequenceSpec:
    given = dict(spec) if isinstance(spec, Mapping) else {}
    if (
        set(given) != {"domains", "methods"}
        or not isinstance(given["domains"], list)
        or not isinstance(given["methods"], (list, Mapping))
    ):
        raise OptionError(
            f"{path}: sequences: {name} expects domains (a list) and methods (a list, or label: "
            f"options), found {brief(spec)}"
        )
    methods = (
        given["methods"]
        if isinstance(given["methods"], Mapping)
        else dict.fromkeys(map(str, given["methods"]))
    )
    laid = {
        label: {
            key.replace("-", "_"): value
            for key, value in check_mapping(over, f"{path}: sequences: {name}: {label}").items()
        }
        for label, over in _named_parts(f"{path}: sequences: {name}: methods", methods).items()
    }
    return SequenceSpec(tuple(map(str, given["domains"])), laid)


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
        if (like := str(over.get("like", label))) not in experiment.methods:
            raise OptionError(
                f"{where}: unknown method '{like}'; {nearest(like, experiment.methods)}, or "
                f"`{label}: {{like: plain, method: ...}}`"
            )
        if wrong := [key for key in over if key in OURS]:
            raise OptionError(
                f"{where}: {label}: '{wrong[0]}' is set by the experiment itself; leave it out"
            )
        settings = {
            **experiment.methods[like].settings()[0],
            **{key: value for key, value in over.items() if key != "like"},
        }
        made = lambda settings=settings: tune_options(
            experiment, settings, data="x", replay="x", importance="x", out="x", seed=0
        )
        _named(path, f"sequences: {name}: {label}", made)
        if settings.get("consolidate"):
            _named(
                path,
                f"sequences: {name}: {label}",
                lambda settings=settings: parse_rule(settings["consolidate"]),
            )
    if experiment.model.get("quantize", "none") != "none":
        raise OptionError(
            f"{where}: each step is merged into the weights, which quantize does not allow; "
            "leave out one of them"
        )
    if not experiment.seeds.get("test"):
        raise OptionError(f"{where}: sequences are measured on the test parts; give test seeds")


def _check(path: Any, experiment: Experiment) -> None:
    if len(experiment.general) < 2:
        raise OptionError(
            f"{path}: general: expected at least two texts, of the recorded kind and of another, "
            f"found {len(experiment.general)}: "
            "what is kept may be just what was recorded"
        )
    if not any(method.options["method"] == "plain" for method in experiment.methods.values()):
        raise OptionError(
            f"{path}: methods: none is plain fine-tuning, which learning is measured by; add "
            f"`plain: {{grid: {{learning_rate: [...]}}}}`"
        )
    for part, seeds in experiment.seeds.items():
        if not isinstance(seeds, list) or not all(_is_count(seed, 0) for seed in seeds):
            raise OptionError(
                f"{path}: seeds: {part} expects a list of whole numbers from 0, found "
                f"{brief(seeds)}"
            )
    for what, value in (
        *((f"limit: {part}", limit) for part, limit in experiment.limit.items()),
        ("characters", experiment.characters),
    ):
        if value is not None and not _is_count(value, 1):
            raise OptionError(
                f"{path}: {what} expects a whole number above 0, found {brief(value)}"
            )
    if not experiment.seeds.get("validation"):
        raise OptionError(
            f"{path}: seeds: settings are chosen on the validation part, which needs at least "
            "one seed; add `validation: [0]`"
        )
    if not experiment.shares or not all(0 < share <= 1 for share in experiment.shares):
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
    for name, spec in experiment.sequences.items():
        _check_sequence(path, experiment, name, spec)
    for label, recipe in experiment.importance.items():
        _named(
            path,
            f"importance: {label}",
            lambda recipe=recipe: record_options(experiment, recipe, general="x", out="x"),
        )
    for label, method in experiment.methods.items():
        for settings in method.settings():
            _named(
                path,
                f"methods: {label}",
                lambda settings=settings: tune_options(
                    experiment, settings, data="x", replay="x", importance="x", out="x", seed=0
                ),
            )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 32


def _named(path: Any, where: str, make: Any) -> None:
    try:
        make()
    except OptionError as error:
        raise OptionError(f"{path}: {where}: {error}") from None
