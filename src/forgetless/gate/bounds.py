"""Bounds on what a tuned model may have lost: as they are written, and what each allows.

    read_bounds(options)      # [Bound("divergence", "", "5%", 0.0488), Bound("behaviour", ...)]

    budget        5% of perplexity, or 0.05nats: as a forgetting budget is written
    behaviour     json=-2%: a rate may fall by at most 2 points; repeats=+1%: it may rise by at most
                  one; length=-20%: answers may become shorter by at most a fifth
    task          arc_easy=-1%: an accuracy may fall by at most a point; sciq:acc_norm=-1% names
                  which of a task's accuracies

A file (--bounds) has the same by name, and what the command line says of a name wins:

    budget: 5%
    behaviours: {json: -2%, ends: -5%}
    tasks: {arc_easy: -1%}

Only how it is written is looked at here: whether a model can be judged by it is for asked.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgetless.budget.budget import parse
from forgetless.data.tasks import CHAT_TASKS
from forgetless.errors import OptionError, brief, nearest
from forgetless.evaluate.behaviours import BEHAVIOURS
from forgetless.files.gate_json import OF_BEHAVIOUR, OF_DIVERGENCE, OF_TASK
from forgetless.options.check import CheckOptions
from forgetless.options.option import read_yaml, several

# The behaviours that are not rules of behaviours.py: they need every answer, or the domain.
LENGTH, LEAK = "length", "domain leak"
# Behaviour -> which way it may not go too far: -1 down, 1 up, 0 either, as the sign says.
WORSE_WAY: dict[str, int] = {
    **{each.name: -1 if each.better == "higher" else 1 for each in BEHAVIOURS},
    LENGTH: 0,
    LEAK: 1,
}
# What a file of bounds may hold.
SECTIONS = ("budget", "behaviours", "tasks")


@dataclass(frozen=True)
class Bound:
    """One bound. `allowed` is the largest change that keeps it, with its sign: in nats per token,
    as a part of 1 for rates and accuracies, and for the length as a part of the base's.

    `metric` names the accuracy of a task; `in_file`: a file says it, which several pipelines share.
    """

    of: str
    name: str
    text: str
    allowed: float
    metric: str | None = None
    in_file: bool = False


def read_bounds(options: CheckOptions) -> list[Bound]:
    """The bounds of a file and of the command line. Raises OptionError for what is none."""
    bounds = {(each.of, each.name, each.metric): each for each in _bounds_of_file(options.bounds)}
    given = [_budget_bound(options.budget)] if options.budget else []
    for text in several(options.behaviour):
        given.append(behaviour_bound(*_name_and_bound(text, "--behaviour json=-2%")))
    for text in several(options.task):
        given += task_bounds(*_name_and_bound(text, "--task arc_easy=-1%"))
    bounds |= {(each.of, each.name, each.metric): each for each in given}
    return list(bounds.values())


def _bounds_of_file(file: str | None) -> list[Bound]:
    if file is None:
        return []
    content = read_yaml(file)
    unknown = [key for key in content if key not in SECTIONS]
    if unknown:
        raise OptionError(
            f"--bounds {file}: unknown key '{unknown[0]}'; {nearest(unknown[0], SECTIONS)}"
        )
    bounds = []
    if content.get("budget") is not None:
        bounds.append(_budget_bound(str(content["budget"])))
    for name, text in _section(content, "behaviours", file):
        bounds.append(behaviour_bound(name, text))
    for name, text in _section(content, "tasks", file):
        bounds += task_bounds(name, text)
    if not bounds:
        raise OptionError(f"--bounds {file}: expected {', '.join(SECTIONS)}, found no bound")
    return [Bound(**{**vars(each), "in_file": True}) for each in bounds]


def _section(content: Mapping[str, Any], key: str, file: str) -> list[tuple[str, str]]:
    """The names of one section with their bounds."""
    section = content.get(key) or {}
    if not isinstance(section, dict):
        raise OptionError(
            f"--bounds {file}: expected names with bounds below '{key}', found {brief(section)}"
        )
    return [(str(name), str(text)) for name, text in section.items()]


def _name_and_bound(text: str, example: str) -> tuple[str, str]:
    name, equals, bound = text.rpartition("=")
    if not equals or not name:
        raise OptionError(f"expected a name with its bound, like {example}, found '{text}'")
    return name.strip(), bound.strip()


def _budget_bound(text: str) -> Bound:
    budget = parse(text)
    return Bound(OF_DIVERGENCE, "", budget.text, budget.nats)


def behaviour_bound(name: str, text: str) -> Bound:
    """A bound on a behaviour, whose name may be written with - or _ for its spaces.

    Raises OptionError for unknown names, with all that there are.
    """
    known = name.strip().replace("-", " ").replace("_", " ")
    if known not in WORSE_WAY:
        close = nearest(known, WORSE_WAY)
        guess = f"{close} " if close.startswith("did") else ""
        raise OptionError(
            f"unknown behaviour '{name}'; {guess}known: {', '.join(sorted(WORSE_WAY))}"
        )
    sign, part = _signed_part(f"behaviour {known}", text)
    way = WORSE_WAY[known]
    if way == 0 and sign == 0:
        raise OptionError(
            f"behaviour {known}: expected a sign, since answers may become shorter ({known}=-20%) "
            f"or longer ({known}=+20%), found '{text}'"
        )
    if way and sign == -way:
        better, other = ("higher", "fall") if way < 0 else ("lower", "rise")
        raise OptionError(
            f"behaviour {known}: it is wanted {better}, so its bound is on a {other}: "
            f"{known}={'-' if way < 0 else '+'}{100 * part:g}%, found '{text}'"
        )
    return Bound(OF_BEHAVIOUR, known, _as_written(text), (way or sign) * part)


def task_bounds(name: str, text: str) -> list[Bound]:
    """A bound on the accuracy of a task; 'chat' stands for the same bound on each of its five."""
    task, _, metric = name.partition(":")
    sign, part = _signed_part(f"task {name}", text)
    if sign > 0:
        raise OptionError(
            f"task {name}: an accuracy is wanted higher, so its bound is on a fall: "
            f"{name}=-{100 * part:g}%, found '{text}'"
        )
    names = CHAT_TASKS if task == "chat" else (task,)
    return [Bound(OF_TASK, each, _as_written(text), -part, metric or None) for each in names]


def _signed_part(what: str, text: str) -> tuple[int, float]:
    """'-2%' -> (-1, 0.02), '2%' -> (0, 0.02): the sign, 0 for none, and the part of 1."""
    match = re.fullmatch(r"([+-]?)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%", text.strip())
    if match is None:
        raise OptionError(f"{what}: expected a change in points like -2%, found '{text}'")
    part = float(match[2]) / 100
    if not 0 < part <= 1:
        raise OptionError(
            f"{what}: expected a change above 0% and of at most 100%, found '{text}'; that nothing "
            "is lost at all cannot be shown by any number of answers"
        )
    return {"-": -1, "+": 1, "": 0}[match[1]], part


def _as_written(text: str) -> str:
    return "".join(text.split())
