"""Options of the verbs that make many runs, or show them: compare, report and demo."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.options.option import MEASURED, RUNNING, option


@dataclass(frozen=True)
class CompareOptions:
    """Options of `forgetless compare`: every method of an experiment on one frontier."""

    experiment: str = option(
        "",
        "experiment: a YAML file (docs/compare.md)",
        group="data",
        positional=True,
        metavar="EXPERIMENT.yaml",
        reads=True,
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
class ReportOptions:
    """Options of `forgetless report`: what was measured, as a page or as markdown."""

    folder: str = option(
        "",
        "folder of forgetless compare, demo or tune",
        group="data",
        positional=True,
        metavar="DIR",
        reads=True,
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
