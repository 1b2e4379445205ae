"""Options of every verb: one frozen dataclass each, from which the command line, the YAML files and
the Python calls are made.

An option has one name everywhere (`learning_rate` in Python and YAML, `--learning-rate` on the
command line), one help text and one default. `None` as the default of an option that is not
optional means "the preset decides"; presets are dict literals below that hold only what differs.
Precedence, strongest first: given on the command line, given in `--config FILE.yaml`, the preset,
the default.

This file imports nothing but the standard library (and PyYAML when a file is read), so that
`--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgetless.errors import OptionError, nearest
from forgetless.options.estimators import ESTIMATORS, check_estimator
from forgetless.options.methods import method_settings
from forgetless.options.model import ModelOptions, Options, TextOptions
from forgetless.options.option import MEASURED, RUNNING, checked, option
from forgetless.options.record import RECORD_PRESETS, RecordOptions
from forgetless.options.tune import TuneOptions


@dataclass(frozen=True)
class CompareOptions:
    """Options of `forgetless compare`: every method of an experiment on one frontier."""

    experiment: str = option(
        "",
        "experiment: a YAML file (docs/compare.md)",
        group="data",
        positional=True,
        metavar="EXPERIMENT.yaml",
    )
    out: str = option(
        "",
        "folder to write: runs, importance, compare.json",
        group="output",
        decides=RUNNING,
        metavar="DIR",
    )
    jobs: int = option(
        1,
        "processes that run trials at the same time; with several GPUs each gets its own",
        group="training",
        at_least=1,
        decides=RUNNING,
    )
    part: str = option(
        "both",
        "validation: only choose settings; both: then test the chosen ones with fresh seeds",
        group="measuring",
        choices=("validation", "both"),
        decides=MEASURED,
    )
    dry_run: bool = option(False, "say what would be run", group="output", decides=RUNNING)


@dataclass(frozen=True)
class PlanOptions(ModelOptions):
    """Options of `forgetless plan`: bytes and time, from the model's configuration alone."""

    targets: str = option(
        "all-linear",
        "weights to adapt: names (q_proj,v_proj), all-linear, or a regular expression",
        group="adapter",
        metavar="NAMES",
    )
    rank: int = option(8, "LoRA rank r", group="adapter", at_least=1)
    full: bool = option(
        False, "train the target weights themselves instead of an adapter", group="adapter"
    )
    estimator: str = option(
        "kronecker", "how importance is estimated", group="importance", choices=ESTIMATORS
    )
    tier: str | None = option(
        None,
        "form of the file that tuning reads: f32, bf16, u8, u4, factored[:K], kronecker[:K]; "
        "default: as record writes it",
        group="importance",
        metavar="TIER",
    )
    cov_rank: int = option(
        64,
        "kronecker: rank of the covariances that record keeps; 0: whole",
        group="importance",
        at_least=0,
    )
    tokens: int = option(4096, "tokens per forward pass while tuning", group="data", at_least=2)
    length: int = option(1024, "tokens per sequence", group="data", at_least=2)
    accumulation: int = option(4, "forward passes per optimizer step", group="training", at_least=1)
    general_tokens: int = option(
        500_000, "tokens of general text to record from", group="data", at_least=1
    )
    record_tokens: int = option(
        4096, "tokens per forward pass while recording", group="data", at_least=2
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass", group="training"
    )
    processes: int = option(
        1, "processes that train together, one per device", group="training", at_least=1
    )
    engine: str = option(
        "ddp",
        "ddp: each has the whole model; fsdp: weights, gradients and optimizer state are sharded",
        group="training",
        choices=("ddp", "fsdp"),
    )
    flops: float | None = option(
        None,
        "floating-point operations per second of a device, as 400e12; default: measured here",
        group="training",
        above=0,
        metavar="RATE",
    )
    json: bool = option(False, "print JSON", group="output", decides=RUNNING)


@dataclass(frozen=True)
class EvalOptions(TextOptions, ModelOptions):
    """Options of `forgetless eval`: what was learned, and what was lost."""

    adapter: str | None = option(
        None, "PEFT adapter to compare with the bare base model", group="model", metavar="DIR"
    )
    tuned: str | None = option(
        None, "fully fine-tuned model to compare with MODEL", group="model", metavar="DIR"
    )
    data: str | None = option(
        None,
        "held-out domain data: a file, a Hub dataset, or a task (sciq=test.jsonl)",
        group="data",
        decides=MEASURED,
        metavar="DATA",
    )
    data_split: str | None = option(
        None,
        "split of a Hub dataset given by --data; default: test, or the held-out split of a task",
        group="data",
        decides=MEASURED,
    )
    tasks: str | None = option(
        None,
        "tasks, by name or with a local file: sciq,piqa=test.jsonl; any lm-eval task by its name",
        group="measuring",
        decides=MEASURED,
        metavar="NAMES",
    )
    shots: int = option(
        0,
        "worked examples before each question",
        group="measuring",
        at_least=0,
        decides=MEASURED,
    )
    limit: int | None = option(
        None,
        "evaluate at most this many documents or questions",
        group="measuring",
        at_least=1,
        decides=MEASURED,
    )
    length: int | None = option(
        None,
        "window in tokens; default: the model's context, at most 2048",
        group="measuring",
        at_least=2,
        decides=MEASURED,
    )
    stride: int | None = option(
        None,
        "tokens that a sliding window moves by; default: half the window",
        group="measuring",
        at_least=1,
        decides=MEASURED,
    )
    batch_tokens: int = option(
        None,
        "tokens per forward pass; default: 4096, on a CPU 1024",
        group="measuring",
        at_least=1,
        decides=RUNNING,
    )
    scale: float = option(
        1.0, "evaluate the adapter's update times this number", group="model", at_least=0
    )
    authors_perplexity: bool = option(
        False,
        "also print 2^nats, the figure that the paper's code calls perplexity",
        group="output",
        decides=RUNNING,
    )
    out: str | None = option(
        None, "folder for run.json", group="output", decides=RUNNING, metavar="DIR"
    )


@dataclass(frozen=True)
class ShrinkOptions(TextOptions, ModelOptions):
    """Options of `forgetless shrink`: a finished adapter made to keep a forgetting budget."""

    model: str = option(
        "",
        "base model; default: the one that the adapter names",
        group="model",
        metavar="MODEL",
    )
    adapter: str = option(
        "",
        "PEFT adapter (LoRA, rsLoRA), whoever trained it: a local folder",
        group="model",
        positional=True,
        metavar="ADAPTER",
    )
    importance: str | None = option(
        None,
        "importance file of `forgetless record` for the base model, its folder or a Hub name",
        group="holding",
        metavar="FILE",
    )
    budget: str | None = option(
        None,
        "let perplexity on --general rise by at most this much: 1%, or 0.01nats; without "
        "--general and with --method scale the rise is predicted by --importance, and not checked",
        group="budget",
    )
    data: str | None = option(
        None,
        "held-out domain data, on which learning is measured: a file, a Hub dataset, or a task "
        "(sciq=test.jsonl)",
        group="data",
        decides=MEASURED,
        metavar="DATA",
    )
    data_split: str | None = option(
        None,
        "split of a Hub dataset given by --data; default: test, or the held-out split of a task",
        group="data",
        decides=MEASURED,
    )
    method: str = option(
        "shrink",
        "shrink along importance, or scale all of the update",
        group="method",
        choices=("shrink", "scale"),
    )
    mu: float | None = option(
        None,
        "shrink by 1 / (1 + mu importance), importance in units of what the update meets on "
        "average; instead of --budget",
        group="method",
        at_least=0,
    )
    limit: int | None = option(
        None,
        "use at most this many documents of --general and rows of --data",
        group="measuring",
        at_least=1,
        decides=MEASURED,
    )
    out: str = option(
        "",
        "folder to write, new or empty: final/ (the adapter), run.json",
        group="output",
        decides=RUNNING,
        metavar="DIR",
    )


@dataclass(frozen=True)
class DemoOptions:
    """Options of `forgetless demo`: the whole method on the embedded world and model."""

    out: str = option(
        "forgetless-demo",
        "folder to write: texts, importance, adapters, demo.json, demo.md, demo.png, "
        "compare.json, report.html",
        group="output",
        decides=RUNNING,
        metavar="DIR",
    )
    seeds: int = option(
        1,
        "how many seeds; the table shows mean and standard error over them",
        group="training",
        at_least=1,
    )


@dataclass(frozen=True)
class ReportOptions:
    """Options of `forgetless report`: what was measured, as a page or as markdown."""

    folder: str = option(
        "",
        "folder of forgetless compare, demo or tune",
        group="data",
        positional=True,
        metavar="DIR",
    )
    format: str = option(
        "html",
        "html: one self-contained page; markdown: for a model card or a pull request",
        group="output",
        choices=("html", "markdown"),
    )
    out: str | None = option(
        None,
        "file to write; default: DIR/report.html, and standard output for markdown",
        group="output",
        decides=RUNNING,
        metavar="FILE",
    )
    title: str | None = option(
        None, "title; default: the comparison's or the run's", group="output", metavar="TEXT"
    )


def resolve(
    kind: type[Options],
    given: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Options:
    """The frozen options of one verb from what was given, filled up from the preset.

    Raises OptionError for unknown names and wrong types.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise OptionError(
                f"unknown option '{name}' for {kind.__name__}; {nearest(name, known)}"
            )
    values = {name: checked(known[name], value) for name, value in given.items()}
    if kind is RecordOptions:
        check_estimator(
            values,
            str(
                values.get("estimator")
                or RECORD_PRESETS[str(values.get("preset") or "default")]["estimator"]
            ),
        )
    if presets is not None:
        preset = str(values.get("preset") or known["preset"].default)
        decided = method_settings(values) if kind is TuneOptions else {}
        values = {
            **presets[preset],
            **decided,
            **{
                name: value
                for name, value in values.items()
                if value is not None or known[name].default is not None
            },
        }
    return kind(**values)
