"""Every verb of the command line, a row each, and how its options are filled up.

A verb is a frozen dataclass of options, a function that takes them, and a row here that brings the
two together. The command line, YAML files and Python calls are all made from the dataclass: an
option has one name everywhere (`learning_rate` in Python and YAML, `--learning-rate` on the command
line), one help text and one default. `None` as the default of an option that is not optional means
that the preset decides; presets hold only what differs. Where several say something of an option,
the first of these counts: the command line, `--config FILE.yaml`, what a method sets, the preset,
the default.

    options = resolve(TuneOptions, {"model": "gpt2", "data": "d.jsonl", "out": "run"})
    VERBS["tune"].perform(options)

Nothing heavy is imported, so that `--help` answers at once: functions are named by reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forgetless.errors import OptionError, nearest
from forgetless.options.chat import ChatOptions, check_chat
from forgetless.options.check import CheckOptions, check_bounded
from forgetless.options.compare import CompareOptions, DemoOptions, ReportOptions, check_demo
from forgetless.options.estimators import check_estimator
from forgetless.options.files import ConvertOptions, InspectOptions
from forgetless.options.finished import EvalOptions, MergeOptions, ShrinkOptions
from forgetless.options.methods import method_settings
from forgetless.options.model import Options
from forgetless.options.next_steps import (
    after_chat,
    after_check,
    after_compare,
    after_convert,
    after_eval,
    after_inspect,
    after_merge,
    after_plan,
    after_record,
    after_shrink,
)
from forgetless.options.option import Given, checked, flag, several
from forgetless.options.other_names import option_meant
from forgetless.options.plan import PlanOptions
from forgetless.options.record import RECORD_PRESETS, RecordOptions
from forgetless.options.reference import resolved
from forgetless.options.tune import TuneOptions
from forgetless.options.tune_presets import TUNE_PRESETS


@dataclass(frozen=True)
class Verb:
    """One verb.

    help         what it does, in one line
    example      a command line
    options      its options, a frozen dataclass
    run          the function that does it, by reference (options/reference.py), or which one does
    call         how that function takes the options, where not as they are
    needed       options that must be given
    presets      name of a preset -> the options that it sets
    check_given  what was given -> OptionError for what does not fit together
    settings     what was given -> options that it sets, stronger than the preset
    check        the options -> OptionError for what cannot be, before anything is loaded
    alone        whether it writes and does not share work between processes
    reports      what --json prints: the options and the result of `run` -> JSON, by reference; ""
                 is the result itself, None where there is none
    then         the options -> the command that is likely to come next
    interrupted  how to go on after an interruption
    """

    help: str
    example: str
    options: type[Any]
    run: str | Callable[[Any], str]
    call: Callable[[Callable[..., Any], Any], Any] = lambda function, options: function(options)
    needed: tuple[str, ...] = ()
    presets: Mapping[str, Given] | None = None
    check_given: Callable[[Given], None] | None = None
    settings: Callable[[Given], Given] | None = None
    check: Callable[[Any], None] | None = None
    alone: bool = False
    reports: str | None = None
    then: Callable[[Any], str] | None = None
    interrupted: str = ""

    def resolve(self, given: Given) -> Any:
        """The options from what was given, with everything checked that needs no model."""
        options: Any = resolve(self.options, given)
        missing = [name for name in self.needed if not getattr(options, name)]
        if missing:
            names = ", ".join(map(self.shown, missing))
            raise OptionError(f"missing {names}; for example: {self.example}")
        if self.check is not None:
            self.check(options)
        return options

    def perform(self, options: Any) -> Any:
        """Do it; what heavy it takes is imported now."""
        reference = self.run if isinstance(self.run, str) else self.run(options)
        return self.call(resolved(reference), options)

    def shown(self, name: str) -> str:
        """How one of its options is written on the command line."""
        metadata = self.options.__dataclass_fields__[name].metadata
        return str(metadata["metavar"]) if metadata["positional"] else flag(name)


def _check_recorded(given: Given) -> None:
    """An estimator does not ignore options that other estimators read."""
    preset = RECORD_PRESETS[str(given.get("preset") or "default")]
    check_estimator(given, str(given.get("estimator") or preset["estimator"]))


def _tuned_by(options: TuneOptions) -> str:
    """Several domains are learned in turn."""
    if options.after or len(several(options.data)) > 1:
        if options.against_plain:
            raise OptionError("--against-plain is for one domain, found several, or --after")
        return "forgetless.sequence.sequence:tune_in_turn"
    if options.against_plain:
        return "forgetless.tune.with_plain:tune_with_plain"
    return "forgetless.tune.tune:tune"


def _demo_of(options: DemoOptions) -> str:
    """A chat model is shown on what it says itself, the embedded model on its world."""
    if options.model:
        return "forgetless.demo.chat_run:demo_on_model"
    return "forgetless.demo.run:demo"


def _check_measured(options: EvalOptions) -> None:
    """There is something to measure: a tuned model has at least moved away from its base."""
    named = options.general or options.data or options.tasks
    if not (named or options.adapter or options.tuned):
        raise OptionError(
            "nothing to measure: give --adapter or --tuned, --general TEXT, --data DATA or --tasks "
            "NAMES"
        )


VERBS: dict[str, Verb] = {
    "record": Verb(
        help="record what matters in a base model, once, into an importance file",
        example="forgetless record MODEL --general wiki.jsonl --out model.importance.safetensors",
        options=RecordOptions,
        presets=RECORD_PRESETS,
        check_given=_check_recorded,
        needed=("model",),
        run="forgetless.record.record:record",
        interrupted="--resume goes on from the last saved state",
        reports="forgetless.importance.as_json:recorded_file",
        then=after_record,
    ),
    "plan": Verb(
        help="say what recording and tuning will take: bytes, memory, time",
        example="forgetless plan MODEL --tier kronecker:16 --processes 4",
        options=PlanOptions,
        needed=("model",),
        run="forgetless.plan.plan:plan",
        then=after_plan,
    ),
    "tune": Verb(
        help="fine-tune on domain data while holding it",
        example="forgetless tune MODEL --data domain.jsonl --out run",
        options=TuneOptions,
        presets=TUNE_PRESETS,
        settings=method_settings,
        needed=("model", "data", "out"),
        run=_tuned_by,
        interrupted="--resume goes on from the last saved state",
        reports="",
    ),
    "eval": Verb(
        help="measure what was learned and what was lost",
        example="forgetless eval MODEL --adapter run/final --general held-out.jsonl --tasks sciq",
        options=EvalOptions,
        needed=("model",),
        run="forgetless.evaluate.evaluate:evaluate",
        check=_check_measured,
        alone=True,
        reports="",
        then=after_eval,
    ),
    "check": Verb(
        help="judge a tuned model against bounds on what it may have lost, for pipelines",
        example="forgetless check BASE run --budget 5% --behaviour json=-2% --out checked",
        options=CheckOptions,
        needed=("model", "tuned"),
        run="forgetless.gate.check:check_verb",
        check=check_bounded,
        alone=True,
        reports="forgetless.report.gate_files:reported_gate",
        then=after_check,
    ),
    "chat": Verb(
        help="talk to the base and the tuned model side by side",
        example="forgetless chat run",
        options=ChatOptions,
        needed=("model",),
        run="forgetless.chat.chat:chat",
        check=check_chat,
        alone=True,
        then=after_chat,
    ),
    "compare": Verb(
        help="run every method of an experiment and put them on one frontier",
        example="forgetless compare experiment.yaml --out comparison",
        options=CompareOptions,
        needed=("experiment", "out"),
        run="forgetless.compare.compare:compare",
        alone=True,
        interrupted="the same command goes on",
        reports="",
        then=after_compare,
    ),
    "shrink": Verb(
        help="make a finished adapter keep a forgetting budget",
        example="forgetless shrink ADAPTER --importance model.importance.safetensors --budget 1% "
        "--general held-out.jsonl --out shrunk",
        options=ShrinkOptions,
        needed=("adapter", "out"),
        run="forgetless.budget.shrink:shrink",
        alone=True,
        reports="",
        then=after_shrink,
    ),
    "report": Verb(
        help="show a comparison or a run as one self-contained page, or as markdown",
        example="forgetless report forgetless-demo",
        options=ReportOptions,
        needed=("folder",),
        run="forgetless.report.page:report",
        alone=True,
    ),
    "convert": Verb(
        help="bring an importance file into another form",
        example="forgetless convert full.safetensors --tier kronecker:16 --out small.safetensors",
        options=ConvertOptions,
        needed=("file", "tier", "out"),
        run="forgetless.importance.importance:convert",
        call=lambda convert, options: convert(options.file, options.tier, options.out),
        alone=True,
        then=after_convert,
    ),
    "inspect": Verb(
        help="show what is in an importance file",
        example="forgetless inspect model.importance.safetensors",
        options=InspectOptions,
        needed=("file",),
        run="forgetless.importance.importance:describe_file",
        call=lambda describe_file, options: describe_file(options.file),
        reports="forgetless.importance.as_json:inspected_file",
        then=after_inspect,
    ),
    "merge": Verb(
        help="merge an adapter into its base model",
        example="forgetless merge run/final --out merged",
        options=MergeOptions,
        needed=("adapter", "out"),
        run="forgetless.tune.merge:merge",
        call=lambda merge, options: merge(
            options.adapter, options.out, model=options.model, dtype=options.dtype
        ),
        alone=True,
        then=after_merge,
    ),
    "demo": Verb(
        help="run the whole method on the embedded model or a chat model, in minutes",
        example="forgetless demo MODEL --out forgetless-demo",
        options=DemoOptions,
        needed=("out",),
        run=_demo_of,
        check_given=check_demo,
        alone=True,
        reports="",
        interrupted="the same command goes on",
    ),
}


def resolve(kind: type[Options], given: Given) -> Options:
    """The frozen options of one kind from what was given, filled up as their verb's row says.

    Raises OptionError for unknown names and wrong types.
    """
    known = {spec.name: spec for spec in dataclasses.fields(kind)}  # type: ignore[arg-type]
    verb = next((row for row in VERBS.values() if row.options is kind), None)
    for name in given:
        if name not in known:
            of = "".join(f" of {name}" for name, row in VERBS.items() if row.options is kind)
            meant = option_meant(name, known, lambda spec: spec.name) or nearest(name, known)
            raise OptionError(f"unknown option '{name}'{of}; {meant}")
    values = {name: checked(known[name], value) for name, value in given.items()}
    for name, value in values.items():
        if value is not None and value == known[name].metadata["nothing"]:
            values[name] = None
    if verb is not None and verb.check_given is not None:
        verb.check_given(values)
    if verb is None or verb.presets is None:
        return kind(**values)
    preset = verb.presets[str(values.get("preset") or known["preset"].default)]
    decided = {} if verb.settings is None else verb.settings(values)
    said = {
        name: value
        for name, value in values.items()
        if value is not None or known[name].default is not None
    }
    return kind(**{**preset, **decided, **said})
