"""An experiment: methods, settings, domains and seeds, from which every run follows.

experiment_file.py reads it from a file. Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forgetless.data.own_text import NOT_READ, OWN_KINDS, OwnText
from forgetless.options.option import RUNNING, Given
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve

# Options that name files: what is in them decides a run, and their hashes are in `more`.
BY_CONTENT = ("data", "replay", "importance")
# What once stood in the address of every run, at one and the same value, though it decides nothing:
# it stays there, so that runs made before are still found.
ONCE: Given = {
    "eval_steps": 0,
    "max_forgetting": None,
    "offload_importance": False,
}
# As the value of `replay`, it stands for the text that importance is recorded on.
RECORDED = "recorded"
# (method, domain) -> the settings that were chosen for them: options of `tune` by name.
Chosen = Mapping[tuple[str, str], Given]


@dataclass(frozen=True)
class MethodSpec:
    """One method: options of `tune`, and lists of values of which every combination is tried."""

    label: str
    options: Given
    grid: Mapping[str, list[Any]]
    family: str

    def settings(self) -> list[Given]:
        """Every combination of the grid with the fixed options."""
        names = list(self.grid)
        return [
            {**self.options, **dict(zip(names, values, strict=True))}
            for values in itertools.product(*self.grid.values())
        ]

    def needs(self, recorded: str) -> str:
        """What it takes besides the domain data, where importance is recorded on `recorded`."""
        replay = self.options.get("replay")
        text = replay and (recorded if replay == RECORDED else replay) not in NOT_READ
        needs = [
            *(["general text while tuning"] if text else []),
            *(["importance file"] if self.options.get("importance") else []),
        ]
        return ", ".join(needs) or "nothing"


@dataclass(frozen=True)
class SequenceSpec:
    """Domains that are learned one after another, and the methods that do: label -> options laid
    over those chosen for the method that it is `like`.
    """

    domains: tuple[str, ...]
    methods: Mapping[str, Given]

    def settings(self, label: str, domain: str, chosen: Chosen) -> Given:
        """The options of a step.

        Raises ValueError where no setting could be chosen, since no run of that method succeeded.
        """
        over = dict(self.methods[label])
        like = over.pop("like", label)
        if (like, domain) not in chosen:
            raise ValueError(f"{like} has no finished run on {domain} to choose settings from")
        return {**chosen[like, domain], **over}


@dataclass(frozen=True)
class Experiment:
    """What a YAML file says, checked."""

    title: str
    model: Given  # options that say which model is loaded, and how
    general: dict[str, dict[str, str]]  # name -> text, test
    domains: dict[str, dict[str, str]]  # name -> data, test
    methods: dict[str, MethodSpec]
    training: Given = field(default_factory=dict)
    importance: Mapping[str, Given] = field(default_factory=dict)
    seeds: dict[str, list[int]] = field(
        default_factory=lambda: {"validation": [0], "test": [1, 2, 3]}
    )
    scales: tuple[float, ...] = (0.25, 0.5, 0.75)
    shares: tuple[float, ...] = (0.5, 0.8, 0.95)
    limit: dict[str, int] = field(default_factory=lambda: {"validation": 100, "test": 300})
    trials: str = "equal"
    characters: int | None = None  # of each general document that are evaluated
    sequences: dict[str, SequenceSpec] = field(default_factory=dict)
    # What the files of the base model are (model/fingerprint.py), where runs are about to be made
    base: str = ""
    # name -> multiple-choice questions that no domain teaches
    tasks: dict[str, str] = field(default_factory=dict)
    # Of general texts that the model says itself, as `tune` has these options.
    answers: int = OwnText.answers
    answer_length: int = OwnText.length
    prompts: str | None = OwnText.prompts

    @property
    def reference(self) -> str:
        """The method whose learning is the measure: plain fine-tuning."""
        return next(
            label
            for label, method in self.methods.items()
            if method.options.get("method") == "plain"
        )

    @property
    def recorded(self) -> str:
        """The general text that importance is recorded on."""
        return next(iter(self.general))

    def own(self, name: str) -> OwnText | None:
        """What a general text asks of the model itself; None for a text that is read."""
        return self.own_text(self.general[name]["text"])

    def own_text(self, word: str) -> OwnText | None:
        """The same of what stands for a general text in an option."""
        if word not in OWN_KINDS:
            return None
        return OwnText(word, self.answers, self.answer_length, self.prompts)

    @property
    def asking(self) -> Given:
        """The options that say how the model is asked; none where no general text is its own."""
        if not any(map(self.own, self.general)):
            return {}
        names = ("answers", "answer_length", "prompts")
        return {name: getattr(self, name) for name in names}

    @property
    def last_part(self) -> str:
        """The part that the result is of: without test seeds the validation part."""
        return "test" if self.seeds.get("test") else "validation"

    def texts(self, part: str) -> list[str]:
        """The general texts that a run on this part is measured on.

        Settings are chosen on the recorded kind alone; the others wait for the test, if any.
        """
        if part == "validation" and self.seeds.get("test"):
            return [self.recorded]
        return list(self.general)


@dataclass(frozen=True)
class Trial:
    """One run: a method at a setting on a domain, with a seed, evaluated on one part."""

    method: str
    domain: str
    settings: Given
    part: str
    seed: int


def record_options(
    experiment: Experiment, recipe: Given, *, general: str, out: str
) -> RecordOptions:
    """The options of one recording."""
    given = {**experiment.model, **experiment.asking, "general": general, **recipe, "out": out}
    return resolve(RecordOptions, given)


def tune_options(
    experiment: Experiment,
    settings: Given,
    *,
    data: str,
    replay: str,
    importance: str | None,
    out: str,
    seed: int,
) -> TuneOptions:
    """The options of one run; `replay` and `importance` are what the settings' words stand for."""
    given = {
        "general": None,  # a comparison measures by itself
        **experiment.model,
        **experiment.asking,
        **experiment.training,
        **settings,
        "data": data,
        "out": out,
        "seed": seed,
    }
    if given.get("replay") == RECORDED:
        given["replay"] = replay
    if given.get("importance"):
        given["importance"] = importance
    return resolve(TuneOptions, given)


def validation_trials(experiment: Experiment) -> list[Trial]:
    """Every setting on every domain with the validation seeds; plain first, since the others are
    measured by it.
    """
    order = sorted(
        experiment.methods.values(), key=lambda method: method.label != experiment.reference
    )
    return [
        Trial(method.label, domain, settings, "validation", seed)
        for domain in experiment.domains
        for method in order
        for settings in method.settings()
        for seed in experiment.seeds.get("validation", [])
    ]


def final_trials(experiment: Experiment, chosen: Chosen) -> list[Trial]:
    """The chosen setting of each (method, domain) with the test seeds."""
    return [
        Trial(method, domain, settings, "test", seed)
        for (method, domain), settings in chosen.items()
        for seed in experiment.seeds.get("test", [])
    ]


def identity(options: TuneOptions, *, more: Iterable[Any]) -> str:
    """16 hex digits of everything that decides a run: its options without places and machine, and
    `more` (hashes of data, recipe, evaluation).
    """
    decided = dict(ONCE)
    for spec in dataclasses.fields(options):
        value = getattr(options, spec.name)
        unsaid = spec.metadata["later"] and value == spec.default
        if spec.name not in BY_CONTENT and spec.metadata["decides"] != RUNNING and not unsaid:
            decided[spec.name] = value
    return hashlib.sha256(
        json.dumps([decided, *more], sort_keys=True, default=str).encode()
    ).hexdigest()[:16]
