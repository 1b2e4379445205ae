"""The command that is likely to come after a verb, as the verb's last line shows it.

    after_record(options)      # "forgetless tune MODEL --data DATA --importance m.safetensors ..."

Names that only the user knows stand in capitals.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from forgetless.options.chat import ChatOptions
from forgetless.options.check import CheckOptions
from forgetless.options.compare import CompareOptions
from forgetless.options.files import ConvertOptions, InspectOptions
from forgetless.options.finished import EvalOptions, MergeOptions, ShrinkOptions
from forgetless.options.plan import PlanOptions
from forgetless.options.record import RecordOptions


def _command(*words: str) -> str:
    return shlex.join(["forgetless", *words])


def after_record(options: RecordOptions) -> str:
    """Tuning, with a budget where there is a text to keep it on."""
    words = ["tune", options.model, "--data", "DATA"]
    if not options.out:  # tune finds it in the cache
        return _command(*words, "--out", "run")
    words += ["--importance", options.out]
    if options.general:
        words += ["--general", options.general, "--budget", "1%"]
    return _command(*words, "--out", "run")


def after_plan(options: PlanOptions) -> str:
    """Recording what was planned."""
    words = ["record", options.model, "--general", "chat"]
    if options.estimator != "kronecker":
        words += ["--estimator", options.estimator]
    return _command(*words, "--out", "model.importance.safetensors")


def after_eval(options: EvalOptions) -> str:
    """Looking at answers of both models, where two were compared."""
    for name in ("adapter", "tuned"):
        if folder := getattr(options, name):
            return _command("chat", options.model, f"--{name}", folder)
    return ""


def after_chat(options: ChatOptions) -> str:
    """Numbers for what was seen, where a run was talked to."""
    if options.adapter or options.tuned or options.prompt is not None or not options.prompts:
        return ""
    return _command("report", options.model)


def after_check(options: CheckOptions) -> str:
    """Looking at the answers of a run; what else TUNED is, is known to who gave it."""
    is_run = (Path(options.tuned).expanduser() / "run.json").is_file()
    return _command("chat", options.tuned) if is_run else ""


def after_compare(options: CompareOptions) -> str:
    """The page, or what was only said to be run."""
    if options.dry_run:
        return _command("compare", options.experiment, "--out", options.out)
    return _command("report", options.out)


def after_shrink(options: ShrinkOptions) -> str:
    """Looking at answers of the shrunk model."""
    return _command("chat", options.out)


def after_convert(options: ConvertOptions) -> str:
    """What is in the new file."""
    return _command("inspect", options.out)


def after_inspect(options: InspectOptions) -> str:
    """Tuning by the file."""
    return _command("tune", "MODEL", "--data", "DATA", "--importance", options.file, "--out", "run")


def after_merge(options: MergeOptions) -> str:
    """What the merged model has lost."""
    return _command("eval", "MODEL", "--tuned", options.out, "--general", "chat")
