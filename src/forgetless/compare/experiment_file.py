"""The YAML file of an experiment: read with its base, checked, made an Experiment (experiment.py).

Nothing heavy is imported.

    model: Qwen/Qwen3-0.6B
    general:          # the first is what importance is recorded on, what is replayed and what KL
                      # holds to; the others are only measured. `chat: chat` is the model's own
                      # answers, on which forgetting is the divergence from the base
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
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.compare.experiment import Experiment, MethodSpec, SequenceSpec
from forgetless.compare.experiment_checks import OURS, check_experiment
from forgetless.data.own_text import OWN_KINDS, read_text
from forgetless.errors import FileError, OptionError, brief, nearest
from forgetless.files.untrusted import JsonObject, check_mapping, check_name
from forgetless.options.methods import FAMILIES
from forgetless.options.methods import family as family_of
from forgetless.options.option import read_yaml, several

# The most settings of one method: more are a mistake in a grid, and would be listed for minutes.
MOST_SETTINGS = 10_000
# The parts of an experiment whose keys become names of files and folders.
NAMED = ("general", "domains", "methods", "importance", "sequences", "tasks")
# The keys that say which model is loaded, and how.
MODEL = ("model", "dtype", "device", "revision", "quantize", "threads", "trust_remote_code")
KNOWN = {field.name for field in dataclasses.fields(Experiment)} | {"base", *MODEL}


def read(path: str | Path) -> Experiment:
    """The experiment in a YAML file.

    Raises OptionError for unknown keys, missing parts, wrong options, and an unequal number of
    trials, FileError where there is no such file.
    """
    if not Path(path).is_file():
        raise FileError(f"experiment '{path}' does not exist")
    try:
        return _read(path)
    except FileError as error:
        raise error if isinstance(error, OptionError) else OptionError(str(error)) from None


def _read(path: str | Path) -> Experiment:
    return experiment_of(_with_base(Path(path)), path)


def experiment_of(given: JsonObject, path: str | Path) -> Experiment:
    """The experiment that a mapping says; `path` stands in messages.

    Raises FileError, most often an OptionError, where it does not make one.
    """
    experiment = _unchecked(given, path)
    check_experiment(path, experiment)
    return experiment


def as_given(experiment: Experiment) -> JsonObject:
    """An experiment as a mapping that a file may hold: `experiment_of` makes the same of it."""
    plain = dataclasses.asdict(experiment)
    plain |= plain.pop("model")
    del plain["base"]  # follows from the files; in a file it names another one
    if not experiment.asking:
        for name in ("answers", "answer_length", "prompts"):
            del plain[name]
    plain["methods"] = {
        label: {**method.options, "family": method.family, "grid": dict(method.grid)}
        for label, method in experiment.methods.items()
    }
    return {key: value for key, value in json.loads(json.dumps(plain)).items() if value is not None}


def read_back(path: str | Path) -> Experiment:
    """The experiment in a file of `as_given`, which was checked when it was written."""
    return _unchecked(read_yaml(path), path)


def _unchecked(given: JsonObject, path: str | Path) -> Experiment:
    _check_keys(path, given)
    parts = {key: _named_parts(f"{path}: {key}", given.get(key)) for key in NAMED}
    importance = {
        label: check_mapping(recipe, f"{path}: importance: {label}")
        for label, recipe in parts["importance"].items()
    }
    methods = {
        label: _method(label, check_mapping(spec, f"{path}: methods: {label}"), importance)
        for label, spec in parts["methods"].items()
    }
    return Experiment(
        title=str(given.get("title") or Path(path).stem),
        model={key: given[key] for key in MODEL if given.get(key) is not None},
        importance=importance,
        methods=methods,
        general=_general_texts(path, parts["general"]),
        domains=_places(path, "domains", parts["domains"], "data"),
        training=check_mapping(given.get("training"), f"{path}: training"),
        sequences={name: _sequence(path, name, spec) for name, spec in parts["sequences"].items()},
        tasks={name: str(spec) for name, spec in parts["tasks"].items()},
        **_given_numbers(path, given),
    )


def _check_keys(path: Any, given: Mapping[str, Any]) -> None:
    for key in given:
        if key not in KNOWN:
            raise OptionError(f"{path}: unknown key '{key}'; {nearest(key, KNOWN)}")
    for key in ("model", "general", "domains", "methods"):
        if not given.get(key):
            raise OptionError(f"{path}: missing '{key}'; see docs/compare.md")


def _given_numbers(path: Any, given: Mapping[str, Any]) -> JsonObject:
    """What is given of seeds, limits and the like; the others have their defaults."""
    numbers: JsonObject = {}
    for key in ("trials", "characters", "answers", "answer_length", "prompts"):
        if given.get(key) is not None:
            numbers[key] = given[key]
    for key in ("scales", "shares"):
        if given.get(key) is not None:
            numbers[key] = tuple(map(float, _numbers(given[key], f"{path}: {key}")))
    known = {"seeds": ("validation", "test"), "limit": ("validation", "test", "questions")}
    for key, names in known.items():
        if given.get(key) is not None:
            numbers[key] = check_mapping(given[key], f"{path}: {key}", names)
    return numbers


def _with_base(path: Path, above: tuple[Path, ...] = ()) -> JsonObject:
    """The mapping of a file laid over that of its base.

    Keys of methods and domains are kept as written.
    """
    if path.resolve() in above:
        raise OptionError(f"{path}: its base leads back to itself")
    given = read_yaml(path)
    base = given.pop("base", None)
    if not base:
        return given
    return _merged(_with_base(path.parent / str(base), (*above, path.resolve())), given)


def _merged(below: JsonObject, above: JsonObject, where: tuple[str, ...] = ()) -> JsonObject:
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


def _general_texts(path: Any, given: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The general texts; where one is `chat` or `self` and a text with a comma, the text is another
    one, NAME-text.
    """
    texts: dict[str, dict[str, str]] = {}
    for name, place in _places(path, "general", given, "text").items():
        own = [word for word in several(place["text"]) if word in OWN_KINDS]
        if not own:
            texts[name] = place
            continue
        read_too = read_text(place["text"])
        if read_too is None and len(place) > 1:
            raise OptionError(
                f"{path}: general: {name} is what the model says itself, whose parts are answers "
                f"to different prompts; leave out {', '.join(sorted(set(place) - {'text'}))}"
            )
        texts[name] = {"text": own[0]}
        if read_too is not None:
            texts[f"{name}-text"] = {**place, "text": read_too}
    return texts


def _places(
    path: Any, where: str, given: Mapping[str, Any], main: str
) -> dict[str, dict[str, str]]:
    return {name: _place(path, where, name, value, main) for name, value in given.items()}


def _place(path: Any, where: str, name: str, value: Any, main: str) -> dict[str, str]:
    """The files of a text or a domain, which may be given as the one file alone."""
    given = {main: value}
    if not isinstance(value, str):
        given = check_mapping(value, f"{path}: {where}: {name}")
    known = (main, "test", "validation", *(("task",) if where == "domains" else ()))
    if set(given) - set(known) or not given.get(main):
        raise OptionError(
            f"{path}: {where}: {name} expects {main} (and {', '.join(known[1:])}), found "
            f"{', '.join(map(str, given)) or 'nothing'}"
        )
    if "validation" in given and "test" not in given:
        raise OptionError(
            f"{path}: {where}: {name} has a validation file and no test file: the rows that are "
            "trained on would be carved for one and not for the other; give both, or test alone"
        )
    if not all(isinstance(item, str) for item in given.values()):
        raise OptionError(
            f"{path}: {where}: {name} expects names of files or data sets, found "
            f"{', '.join(map(brief, given.values()))}"
        )
    return given


def _named_parts(where: str, value: Any) -> JsonObject:
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


def _method(label: str, spec: JsonObject, importance: Mapping[str, Any]) -> MethodSpec:
    lists = check_mapping(spec.pop("grid", None), f"methods: {label}: grid")
    grid = {
        key.replace("-", "_"): list(values) if isinstance(values, (list, tuple)) else [values]
        for key, values in lists.items()
    }
    count = math.prod(map(len, grid.values()))
    if not 0 < count <= MOST_SETTINGS:
        raise OptionError(
            f"methods: {label}: the grid has {count} settings, expected 1 to {MOST_SETTINGS}"
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
    methods = given["methods"]
    if not isinstance(methods, Mapping):
        methods = dict.fromkeys(map(str, methods))
    laid = {}
    for label, over in _named_parts(f"{path}: sequences: {name}: methods", methods).items():
        options = check_mapping(over, f"{path}: sequences: {name}: {label}")
        laid[label] = {key.replace("-", "_"): value for key, value in options.items()}
    return SequenceSpec(tuple(map(str, given["domains"])), laid)
