"""Options of the verbs that make many runs, or show them: compare, report and demo."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.errors import OptionError
from forgetless.options.model import ModelOptions
from forgetless.options.option import MEASURED, RUNNING, Given, flag, option


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
    against_plain: str | None = option(
        None,
        "for a run: folder of a run of --method plain on the same data, to be shown against",
        group="data",
        metavar="DIR",
        reads=True,
    )
    conversations: str | None = option(
        None,
        "for a run: pairs of answers that forgetless chat --prompts wrote of it, and after a "
        "comma those of the plain one",
        group="data",
        metavar="FILE",
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
class DemoOptions(ModelOptions):
    """Options of `forgetless demo`: the whole method on the embedded world and model, or on a chat
    model.
    """

    model: str = option(
        "",
        "chat model to show it on: a Hub name or a local folder; without it the model and the "
        "world that come with the package",
        group="model",
        positional=True,
        metavar="MODEL",
    )
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
    steps: int = option(
        30, "with MODEL: optimizer steps of each training", group="training", at_least=1
    )
    answers: int = option(
        32,
        "with MODEL: answers of the model that are recorded on and kept, and as many others that "
        "forgetting is measured on",
        group="data",
        at_least=10,
    )
    answer_length: int = option(
        96, "with MODEL: tokens of an answer at most", group="data", at_least=2
    )
    behaviours: int = option(
        24,
        "with MODEL: prompts on which the behaviour of the models is compared",
        group="measuring",
        at_least=4,
    )


# The options that the demo on the embedded model has.
OF_EMBEDDED = ("model", "out", "seeds")


def check_demo(given: Given) -> None:
    """Raise OptionError for what the demo on the embedded model would not read."""
    if given.get("model"):
        return
    unread = [name for name, value in given.items() if value is not None]
    unread = [name for name in unread if name not in OF_EMBEDDED]
    if unread:
        raise OptionError(
            f"{flag(unread[0])} is for the demo on a chat model; give forgetless demo MODEL, or "
            "leave it out"
        )
