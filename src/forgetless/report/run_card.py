"""The card of what `tune` or `shrink` left: what was kept, what was lost, and the command that
makes it again.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forgetless.files.behaviours_json import BehaviourChange
from forgetless.files.hub import hub_name, shareable
from forgetless.files.measured_json import Interval, Loss, Measured, Scores
from forgetless.files.run_json import Environment, Run
from forgetless.options.methods import budget_pulls
from forgetless.options.option import RUNNING, as_dict, deciding
from forgetless.options.verbs import VERBS, resolve
from forgetless.report import numbers
from forgetless.report.behaviours import behaviour_cells
from forgetless.report.budget import in_one_line
from forgetless.report.card_words import (
    FrontMatter,
    code,
    dataset_name,
    one_line,
    versions_in_words,
)
from forgetless.report.markdown import plain

# What the card says where there was no budget, and where nothing was measured.
NO_BUDGET = "none: nothing bounds what may be lost"
NOTHING_MEASURED = "Nothing was measured: give `--general` and `--eval-data` to see it here."


def run_card(verb: str, run: Run, *, what: str = "adapter") -> tuple[FrontMatter, str]:
    """(front matter, section) of the result of `tune` or `shrink` (`verb`), from its run.json:
    what was kept, what was lost, and how to make it again.
    """
    options = run.configuration
    base, data = hub_name(options.get("model")), dataset_name(options.get("data"))
    front: FrontMatter = {
        "base_model": base,
        "datasets": [data] if data else None,
        "tags": ["forgetless"],
    }
    if not base:
        front["base_model_relation"] = None
    lines = [
        "## What was kept, what was lost",
        "",
        f"This {what} was made by forgetless `{verb}`. {' '.join(_learned_and_lost(run))}",
        "",
        *(_measured_table(run) or [NOTHING_MEASURED]),
        "",
        *(f"* {key}: {value}" for key, value in _items(verb, run)),
        "",
        "To make it again:",
        "",
        "```sh",
        command(verb, options),
        "```",
    ]
    return front, "\n".join(lines)


def _learned_and_lost(run: Run) -> Iterator[str]:
    if run.forgetting is None:
        yield "What it lost was not measured: no general text was given."
    else:
        lost = numbers.nats(run.forgetting.nats, run.forgetting.standard_error)
        if run.forgetting.diverged:
            yield f"On the base's own answers it has moved by {lost} nats per token (divergence)."
        else:
            yield f"Loss on general text rose by {lost} nats per token."
    if run.learning is not None:
        learned = numbers.nats(run.learning.nats, run.learning.standard_error)
        yield f"Loss on the domain's held-out data fell by {learned}."


def _items(verb: str, run: Run) -> Iterator[tuple[str, str]]:
    """What the run was made of and with."""
    options = run.configuration
    yield "base model", code(shareable(options.get("model")))
    yield "method", code("+".join(run.method or [options.get("method", "?")]))
    if verb == "tune" and run.budget is not None:
        pulls = budget_pulls(",".join(run.method or []))
        yield "strength" if pulls else "weight of the divergence", "set by the budget"
    elif options.get("strength") is not None:
        yield "strength", f"{options['strength']:g}"
    if run.importance is not None:
        file = code(shareable(run.importance.file))
        yield "importance", f"{file}, sha256 {code(run.importance.sha256)}"
    yield "budget", NO_BUDGET if run.budget is None else plain(in_one_line(run.budget))
    if options.get("data"):
        yield "data", _data(run)
    if options.get("general"):
        yield "general text", code(shareable(options["general"]))
    versions = (run.environment or Environment()).versions
    if versions:
        yield "made with", plain(one_line(versions_in_words(versions)))


def _data(run: Run) -> str:
    source = code(shareable(run.configuration["data"]))
    if run.data is None:
        return source
    sha256 = code(str(run.data.sha256)[:16])
    return f"{source}, {numbers.integer(run.data.rows)} rows, sha256 {sha256}"


def _measured_table(run: Run) -> list[str]:
    """Before, after and change of everything that was measured, ± standard error."""
    before, after = run.before or Measured(), run.after or Measured()
    rows = [
        *_own_answers(before.own, after.own),
        *_general(before.general, after.general, run.general or run.forgetting),
        *_domain(before.domain, after.domain, run.learning),
        *_tasks(before, after),
        *_judged_rows(run.behaviours or []),
    ]
    if not rows:
        return []
    head = ["| | before | after | change |", "|---|---:|---:|---:|"]
    return [*head, *("| " + " | ".join(row) + " |" for row in rows)]


CardRow = tuple[str, str, str, str]  # what, before, after, change


def _own_answers(before: Loss | None, after: Loss | None) -> Iterator[CardRow]:
    if before is not None and after is not None:
        moved = _loss_in_words(after)
        yield "divergence on own answers, nats per token", "0", moved, moved


def _general(before: Loss | None, after: Loss | None, rise: Interval | None) -> Iterator[CardRow]:
    if before is None or after is None:
        return
    change = rise or Interval()
    moved = numbers.nats(change.nats, change.standard_error)
    yield "general loss, nats per token", _loss_in_words(before), _loss_in_words(after), moved
    ratio = 1.0
    if before.perplexity and after.perplexity:
        ratio = after.perplexity / before.perplexity
    perplexities = numbers.nats(before.perplexity), numbers.nats(after.perplexity)
    yield "general perplexity", *perplexities, f"{100 * (ratio - 1):+.2f} %"


def _domain(before: Loss | None, after: Loss | None, fall: Interval | None) -> Iterator[CardRow]:
    if before is None or after is None:
        return
    change = fall or Interval()
    rise = None if change.nats is None else -change.nats
    moved = numbers.nats(rise, change.standard_error)
    yield "domain loss, nats per token", _loss_in_words(before), _loss_in_words(after), moved


def _tasks(before: Measured, after: Measured) -> Iterator[CardRow]:
    for name, scores in before.tasks.items():
        first = (scores or Scores()).numbers
        last = (after.tasks.get(name) or Scores()).numbers
        then, now = first.get("acc"), last.get("acc")
        if then is not None and now is not None:
            yield (
                f"{plain(name)} accuracy",
                numbers.accuracy(then, first.get("acc_stderr")),
                numbers.accuracy(now, last.get("acc_stderr")),
                f"{100 * (now - then):+.1f} %",
            )


def _judged_rows(behaviours: Sequence[BehaviourChange]) -> Iterator[CardRow]:
    """How many answers do what users notice; a change beyond the noise says which way it is."""
    for each in behaviours:
        counts, _, before, after, change, _, verdict, _ = (
            cell.shown for cell in behaviour_cells(each)
        )
        yield plain(counts), before, after, f"{change} ({verdict})" if verdict else change


def _loss_in_words(loss: Loss) -> str:
    return numbers.nats(loss.nats, loss.standard_error)


def command(verb: str, options: Mapping[str, Any]) -> str:
    """The command that makes a run again: its options as far as they differ from what preset and
    method would set, without this machine's folders.
    """
    kind = VERBS[verb].options
    given = {
        key: options[key]
        for key in ("preset", "method", "importance")
        if options.get(key) is not None
    }
    usual = as_dict(resolve(kind, given))
    first = "adapter" if verb == "shrink" else "model"
    words = ["forgetless", verb, str(shareable(options[first]))]
    aside = []
    for key, value in options.items():
        as_usual = value == usual.get(key) and key not in ("importance", "method")
        nothing = kind.__dataclass_fields__[key].metadata["nothing"] if key in usual else None
        if nothing and value is None and not as_usual:
            value = nothing
        if key in (first, *deciding(kind, RUNNING)) or as_usual or value in (None, ""):
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, (dict, list)):
            aside.append(f"# with {key}: {value} in a --config file")
        elif isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(shareable(value))]
    return "\n".join([shlex.join([*words, "--out", "run"]), *aside])
