"""Options of `forgetless check`: a tuned model against bounds on what it may have lost."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.errors import OptionError
from forgetless.options.finished import EvalOptions
from forgetless.options.model import ModelOptions, TextOptions
from forgetless.options.option import MEASURED, RUNNING, option, same


@dataclass(frozen=True)
class CheckOptions(TextOptions, ModelOptions):
    """Options of `forgetless check`: what may be lost, what it is judged on, and what is written.

    `bounds` names a file, `budget`, `behaviour` and `task` are bounds themselves.
    """

    model: str = option(
        "",
        "base model: a Hub name or a local folder",
        group="model",
        positional=True,
        metavar="BASE",
        reads=True,
    )
    tuned: str = option(
        "",
        "what was tuned from it: a folder with an adapter of any trainer, a merged model, or a run",
        group="model",
        positional=True,
        metavar="TUNED",
        reads=True,
    )
    budget: str | None = option(
        None,
        "let perplexity of the base's own answers (or of --general TEXT) rise by at most this "
        "much: 5%, or 0.05nats",
        group="budget",
    )
    behaviour: str | None = option(
        None,
        "let the rate of a behaviour become worse by at most so many points: json=-2%, repeats=+1%;"
        " the length of answers: length=-20%; may be given several times (docs/behaviours.md)",
        group="budget",
        metavar="NAME=BOUND",
        repeated=True,
    )
    task: str | None = option(
        None,
        "let the accuracy of a task fall by at most so many points: arc_easy=-1%, "
        "sciq:acc_norm=-1%; may be given several times",
        group="budget",
        metavar="NAME=BOUND",
        repeated=True,
    )
    bounds: str | None = option(
        None,
        "bounds from a YAML file with budget, behaviours and tasks; the options above win",
        group="budget",
        metavar="FILE",
        reads=True,
    )
    strict: bool = option(
        False,
        "end with exit code 3 also where a bound is not shown to be kept; without it only an "
        "exceeded one does",
        group="budget",
        decides=RUNNING,
    )
    own_answers: str | None = option(
        None,
        "the base's own answers as an earlier check wrote them (OUT/answers.json), instead of "
        "asking the base",
        group="data",
        decides=MEASURED,
        metavar="FILE",
        reads=True,
    )
    data: str | None = option(
        None,
        "domain data, whose form 'domain leak' looks for: a file, a Hub dataset, or a task",
        group="data",
        decides=MEASURED,
        metavar="DATA",
        reads=True,
    )
    data_split: str | None = same(EvalOptions, "data_split")
    tasks: str | None = option(
        None,
        "where the questions of the tasks come from, with local files: arc_easy=test.jsonl,sciq; "
        "default: the Hub",
        group="measuring",
        decides=MEASURED,
        metavar="NAMES",
        reads=True,
    )
    shots: int = same(EvalOptions, "shots")
    limit: int | None = same(EvalOptions, "limit")
    behaviours: int = option(
        200,
        "put at most so many prompts of ours to both models, those first that the behaviours with "
        "a bound are about",
        group="measuring",
        at_least=2,
        decides=MEASURED,
    )
    fast: bool = option(
        False,
        "sample nothing: the divergence on answers that are given or cached, and tasks that rank "
        "given answers; bounds of --bounds that need more are left out",
        group="measuring",
        decides=RUNNING,
    )
    out: str | None = option(
        None,
        "folder for run.json, report.html, summary.md, junit.xml and answers.json",
        group="output",
        decides=RUNNING,
        metavar="DIR",
    )


def check_bounded(options: CheckOptions) -> None:
    """Raise OptionError for options that do not fit together, before anything is read."""
    if not (options.budget or options.behaviour or options.task or options.bounds):
        raise OptionError(
            "nothing to check: give bounds, for example --budget 5%, --behaviour json=-2%, --task "
            "arc_easy=-1%, or --bounds FILE"
        )
    if options.own_answers and options.general:
        raise OptionError(
            "--own-answers stands in the place of the answers that --general asks for; give one of "
            "the two"
        )
    if options.fast and options.behaviour:
        raise OptionError(
            "--fast samples nothing, and --behaviour is judged on sampled answers; leave one of "
            "the two out"
        )
