"""TODO tune.checks."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from forgetless.budget.open import check_budget
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import check_tasks
from forgetless.importance.importance import Importance
from forgetless.methods.method import Steps
from forgetless.methods.table import chosen
from forgetless.model import distributed
from forgetless.model.linear import placed
from forgetless.options.tune import TuneOptions
from forgetless.penalty.fit import check_fit


def check_options(options: TuneOptions) -> dict[str, Steps]:
    """Everything that can be refused without loading a model; the methods that the options name."""
    distributed.split_batch(
        options.batch_size, options.accumulation
    )  # refuses what cannot be shared
    if options.full and options.quantize != "none":
        raise OptionError(
            "--full trains the weights themselves, which a quantised base does not allow; leave "
            "out --quantize"
        )
    if options.anchor == "recorded" and options.importance is None:
        raise OptionError("--anchor recorded (also in --preset paper) needs --importance FILE")
    if options.anchor == "recorded" and options.full:
        raise OptionError(
            "--anchor recorded starts from the recorded adapter; use --anchor base with --full"
        )
    if options.report_to != "none" and importlib.util.find_spec(options.report_to) is None:
        raise OptionError(
            f"--report-to {options.report_to} needs a package of that name, which is not "
            f"installed; pip install {options.report_to}"
        )
    if options.private is not None and not options.push_to_hub:
        raise OptionError("--private is for --push-to-hub NAME, which is not given")
    methods = chosen(options)
    check_budget(options, list(methods))
    check_tasks(options.tasks)
    return methods


def check_model(
    options: TuneOptions, model: nn.Module, importance: Importance | None, how: Any
) -> None:
    """Everything that can be refused with the bare model at hand."""
    places = placed(model, options.targets)
    names = [place.name for place in places]
    if importance is not None:
        check_fit(model, importance, names, options.anchor)
        how.coefficients(importance.norms(), places)
    if options.anchor == "recorded" and importance is not None:
        rank = importance.anchors[names[0]][0].shape[0]
        if rank != options.rank:
            raise OptionError(
                f"--anchor recorded goes on from the recorded adapter of rank {rank}, found "
                f"--rank {options.rank}; use --rank {rank} or --anchor base"
            )


def disk_needed(options: TuneOptions, model: nn.Module) -> int:
    """Bytes of the result and of up to three checkpoints (two are kept while the next is written)
    with AdamW's two moments per trained parameter.
    """
    size = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    trained = size(p for p in model.parameters() if p.requires_grad)
    saved = size(model.parameters()) if options.full else trained
    return saved * (2 if options.budget else 1) + 3 * (saved + 2 * trained)
