"""What tune refuses before it trains: options that do not go together, a model that the options do
not fit, a disk that is too small.

    methods = check_tuning(options)              # before anything is loaded
    check_model(options, model, importance, layers)   # with the bare model at hand
    check_free_space(out, disk_needed(options, model))

Each refusal is an OptionError or a ValueError that says what was expected, what was found and what
to do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from torch import nn

from forgetless.budget.open import check_budget
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import check_tasks
from forgetless.importance.importance import Importance
from forgetless.methods.method import MethodSteps
from forgetless.methods.table import chosen
from forgetless.model import distributed
from forgetless.model.linear import places_of
from forgetless.model.packing import check_packing
from forgetless.model.precision import check_trains_in
from forgetless.model.stages import Earlier
from forgetless.options.option import several
from forgetless.options.tune import TuneOptions
from forgetless.penalty.fit import check_fit


def check_tuning(options: TuneOptions) -> dict[str, MethodSteps]:
    """Refuse everything that can be refused without a model; returns the methods that the options
    name.
    """
    # Refuses a batch that the processes cannot divide among them.
    distributed.split_batch(options.batch_size, options.accumulation)
    if options.full and options.quantize != "none":
        raise OptionError(
            "--full trains the weights themselves, which a quantised base does not allow; leave "
            "out --quantize"
        )
    check_trains_in(options, full=options.full)
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


def check_one_domain(options: TuneOptions, earlier: Earlier | None) -> None:
    """Refuse what a sequence of domains is for, unless this run is one of its steps."""
    if earlier is None and (options.after or len(several(options.data)) > 1):
        raise OptionError(
            "several domains, or --after, are tuned by "
            "forgetless.sequence.sequence.tune_in_turn; give tune one --data"
        )


def check_model(
    options: TuneOptions, model: nn.Module, importance: Importance | None, layers: Any
) -> None:
    """Refuse everything that can be refused with the bare model at hand."""
    if options.packing:
        check_packing(model)
    places = places_of(model, options.targets)
    names = [place.name for place in places]
    if importance is not None:
        check_fit(model, importance, names, options.anchor)
        layers.coefficients(importance.norms(), places)
    if options.anchor == "recorded" and importance is not None:
        rank = importance.anchors[names[0]][0].shape[0]
        if rank != options.rank:
            raise OptionError(
                f"--anchor recorded goes on from the recorded adapter of rank {rank}, found "
                f"--rank {options.rank}; use --rank {rank} or --anchor base"
            )


def disk_needed(options: TuneOptions, model: nn.Module) -> int:
    """Bytes that the run will write: the result, and checkpoints.

    Up to three checkpoints lie there at once, since two are kept while the next is written; each
    has AdamW's two moments of every trained parameter. With a budget the result is there twice.
    """
    trained = _size(p for p in model.parameters() if p.requires_grad)
    saved = _size(model.parameters()) if options.full else trained
    results = 2 if options.budget else 1
    return saved * results + 3 * (saved + 2 * trained)


def _size(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)
