"""What both models are put to, so that every bound can be judged; and all that can be refused
before a model is loaded.

    asked = prepare_questions(options, read_bounds(options), tokenizer)
    asked.held_out            # general text, what the base is to say itself, questions of tasks
    asked.prompts             # for behaviours

Only what has a bound is asked. With --fast nothing is sampled, so that bounds on behaviours and on
tasks whose answers are written cannot be judged. On the command line they are refused. In a file,
which a fast check of every change may share with a full one at night, they are left out and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from forgetless.data.domain import load_training_data
from forgetless.data.inputs import HeldOut, read_held_out
from forgetless.data.own_text import CHAT
from forgetless.data.prompts.prompts import Prompt
from forgetless.data.tasks import TASKS, task_specs
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import check_tasks
from forgetless.evaluate.behaviours import OF_ALL, rules_for, special_rule
from forgetless.evaluate.conversations import prompts_about
from forgetless.evaluate.domain_form import completions_of
from forgetless.evaluate.harness import ranks_answers, task_metrics
from forgetless.evaluate.own_answers import chosen_prompts, default_kind
from forgetless.files.gate_json import OF_BEHAVIOUR, OF_DIVERGENCE, OF_TASK
from forgetless.gate.bounds import LEAK, LENGTH, Bound
from forgetless.options.check import CheckOptions

# The accuracies of our own tasks.
OUR_METRICS = ("acc", "acc_norm")
# Behaviours that every answer shows, whatever was asked.
OF_EVERY_ANSWER = (*OF_ALL, LENGTH, LEAK)


@dataclass(frozen=True)
class AskedForBounds:
    """What is asked for the bounds that can be judged; `left_out` says in sentences which cannot.

    `completions` are what the domain teaches to say, and `refused` are prompts that the template
    cannot put to the model, by reason.
    """

    bounds: list[Bound]
    held_out: HeldOut
    prompts: list[Prompt] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    refused: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def judgeable(options: CheckOptions, bounds: Sequence[Bound]) -> tuple[list[Bound], list[str]]:
    """(the bounds that can be judged, sentences on those that --fast leaves out), with every
    question whether options, bounds and tasks fit together answered.

    Raises OptionError or FileError; nothing but lm-eval and the files of tasks is looked at.
    """
    tasks = {bound.name: bound for bound in bounds if bound.of == OF_TASK}
    check_tasks(_task_specs(options, list(tasks)), shots=options.shots)
    for bound in tasks.values():
        _check_metric(bound, options)
    kept = [bound for bound in bounds if not (options.fast and _is_sampled(bound, options))]
    dropped = [bound for bound in bounds if bound not in kept]
    for bound in dropped:
        if not bound.in_file:
            raise OptionError(
                f"--fast samples nothing, and the answers to task {bound.name} are written by the "
                "model; leave one of the two out"
            )
    if not kept:
        raise OptionError("--fast leaves none of the bounds; take it away, or give --budget 5%")
    _check_used(options, kept)
    names = ", ".join(bound.name for bound in dropped)
    return kept, [f"not judged: {names} (--fast samples nothing)"] if dropped else []


def prepare_questions(
    options: CheckOptions, bounds: Sequence[Bound], tokenizer: Any
) -> AskedForBounds:
    """Read and choose what is asked. Raises OptionError or FileError before a model is loaded."""
    kept, left_out = judgeable(options, bounds)
    kinds = {bound.of for bound in kept}
    text = options
    if OF_DIVERGENCE in kinds and not (options.general or options.own_answers):
        text = replace(options, general=default_kind(tokenizer))
    tasks = [bound.name for bound in kept if bound.of == OF_TASK]
    held_out = read_held_out(
        text, tasks=_task_specs(options, tasks), limit=options.limit, shots=options.shots
    )
    if held_out.own is not None and held_out.own.kind == CHAT:
        chosen_prompts(held_out.own, tokenizer, "check")
    asked = AskedForBounds(kept, held_out, left_out=left_out)
    names = [bound.name for bound in kept if bound.of == OF_BEHAVIOUR]
    return _with_behaviours(asked, options, names, tokenizer) if names else asked


def _with_behaviours(
    asked: AskedForBounds, options: CheckOptions, names: Sequence[str], tokenizer: Any
) -> AskedForBounds:
    """The same with the prompts that the behaviours are judged by."""
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            "--behaviour judges what a chat model answers, and the tokenizer of this model has no "
            "chat template; leave the behaviours out"
        )
    prompts, refused = prompts_about(names, options.behaviours, options.prompts, tokenizer)
    ruled = {name for prompt in prompts for name in rules_for(prompt)}
    for name in names:
        if name not in ruled and name not in OF_EVERY_ANSWER:
            raise OptionError(
                f"behaviour {name} cannot be judged: {_why_unasked(name, prompts, refused)}; leave "
                "its bound out"
            )
    completions: list[str] = []
    if options.data:
        rows = load_training_data(options.data, split=options.data_split)
        completions = completions_of(rows)
    return replace(asked, prompts=prompts, refused=refused, completions=completions)


def _why_unasked(
    name: str, prompts: Sequence[Prompt], refused: Mapping[str, Sequence[Prompt]]
) -> str:
    """Why no prompt asks for a behaviour."""
    for reason, those in refused.items():
        if any(special_rule(prompt) == name for prompt in those):
            return reason
    return f"none of {len(prompts)} prompts asks for it (--behaviours)"


def _task_specs(options: CheckOptions, names: Sequence[str]) -> str | None:
    """The tasks that have a bound, with the files that --tasks names for them.

    Raises OptionError for a bound on a task that --tasks lacks, and for a task without a bound.
    """
    specs = {spec.partition("=")[0]: spec for spec in task_specs(options.tasks)}
    if not options.tasks:
        specs = {name: name for name in names}
    for name in names:
        if name not in specs:
            raise OptionError(
                f"task {name} has a bound and is not asked: --tasks names {', '.join(specs)}; add "
                f"{name} or {name}=FILE to it"
            )
    return ",".join(specs[name] for name in dict.fromkeys(names)) or None


def _check_metric(bound: Bound, options: CheckOptions) -> None:
    """Raise OptionError for an accuracy that a task does not have, where its accuracies are known
    without asking it.
    """
    ours = bound.name in TASKS and options.shots == 0
    known = OUR_METRICS if ours else task_metrics(bound.name)
    if bound.metric is not None and known and bound.metric not in known:
        raise OptionError(
            f"task {bound.name} has no accuracy '{bound.metric}'; known: {', '.join(known)}"
        )


def _is_sampled(bound: Bound, options: CheckOptions) -> bool:
    """Whether a bound can be judged only by what the models write."""
    if bound.of == OF_TASK:
        ours = bound.name in TASKS and options.shots == 0
        return not ours and not ranks_answers(bound.name)
    return bound.of == OF_BEHAVIOUR


def _check_used(options: CheckOptions, bounds: Sequence[Bound]) -> None:
    """Raise OptionError for what is given to be judged on and has no bound."""
    named = {bound.name for bound in bounds}
    kinds = {bound.of for bound in bounds}
    if OF_DIVERGENCE not in kinds and (options.general or options.own_answers):
        given = "--general" if options.general else "--own-answers"
        raise OptionError(f"{given} is what a budget is judged on; give --budget too, like 5%")
    if LEAK in named and not options.data:
        raise OptionError(
            f"behaviour {LEAK} looks for the form of the domain's answers; give the domain with "
            "--data DATA"
        )
    if options.data and LEAK not in named:
        raise OptionError(
            f"--data is what behaviour '{LEAK}' looks for; bound that, or leave --data out"
        )
    if options.fast:
        return
    asked = {spec.partition("=")[0] for spec in task_specs(options.tasks)}
    for name in sorted(asked - named):
        raise OptionError(
            f"task {name} is asked and has no bound; give --task {name}=-1%, or leave it out of "
            "--tasks"
        )
