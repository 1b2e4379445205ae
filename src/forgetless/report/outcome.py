"""The end of a run in the terminal: one short table of what was learned and what was lost, and the
commands that one would give next.

                                    nats/token     95 % interval  perplexity
    learned on law-test.jsonl            0.622    0.590 to 0.654     -46.3 %
    lost on its own answers (chat)       0.044    0.036 to 0.052      +4.5 %

    next: forgetless chat run
          forgetless merge run/final --out run/merged

Learned is how much the loss fell on held-out rows. Lost is the divergence from the base on what the
base says itself, or how much the loss rose on a general text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgetless.data.own_text import OWN_KINDS, read_text
from forgetless.files.measured_json import Interval
from forgetless.files.run_json import Run
from forgetless.options.option import several
from forgetless.report import numbers
from forgetless.report.numbers import perplexity_percent
from forgetless.report.terminal import table

# Letters of the name of a text at most, so that a line fits into 80 columns.
LONGEST_LABEL = 24
OF_OWN = {"chat": "its own answers (chat)", "self": "its own text (self)"}


def outcome(run: Run) -> str:
    """What a run has learned and lost, and what was not measured of it."""
    options = run.configuration
    rows = []
    if _is_measured(run.learning):
        held_out = _short_name(options.get("eval_data"))
        rows.append(_row("learned", held_out, run.learning, falls=True))
    if _is_measured(run.forgetting):
        rows.append(_row("lost", _lost_on(run), run.forgetting))
    if _is_measured(run.general):
        rows.append(_row("lost", _short_name(read_text(options.get("general"))), run.general))
    parts = [""]
    if rows:
        sure = next(known for known in (run.forgetting, run.learning) if _is_measured(known))
        level = numbers.percent(getattr(sure, "confidence", None) or 0.95)
        parts.append(table(["", "nats/token", f"{level} interval", "perplexity"], rows))
    return "\n".join([*parts, *_not_measured(run)])


def _is_measured(change: Interval | None) -> bool:
    return change is not None and change.nats is not None


def _lost_on(run: Run) -> str:
    general = run.configuration.get("general")
    kind = next((value for value in several(general) if value in OWN_KINDS), None)
    diverged = run.forgetting is not None and run.forgetting.diverged
    return OF_OWN[kind] if kind and diverged else _short_name(general)


def _row(what: str, on: str, change: Interval | None, *, falls: bool = False) -> list[str]:
    """One line of the table; `falls`: the change counts downwards."""
    change = change or Interval()
    interval, perplexity = numbers.MISSING, numbers.MISSING
    if change.low is not None and change.high is not None:
        interval = f"{numbers.nats(change.low)} to {numbers.nats(change.high)}"
    if change.nats is not None:
        perplexity = f"{perplexity_percent(-change.nats if falls else change.nats):+.1f} %"
    return [f"{what} on {on}", numbers.nats(change.nats), interval, perplexity]


def _not_measured(run: Run) -> Iterator[str]:
    """A sentence for each number that is missing."""
    if not _is_measured(run.learning):
        yield "What was learned was not measured: --eval-data FILE gives held-out rows."
        losses = [entry["loss"] for entry in run.log if isinstance(entry.get("loss"), float)]
        if len(losses) > 1:
            yield f"On the rows trained on the loss went from {losses[0]:.3f} to {losses[-1]:.3f}."
    if not _is_measured(run.forgetting):
        yield "What was lost was not measured: leave out --general none."


def next_commands(out: Path, *, adapter: bool, can_chat: bool) -> str:
    """What one would do with the result of a run: talk to it beside its base, and merge it."""
    talk = shlex.join(["forgetless", "chat", str(out)]) + ("" if can_chat else " --raw")
    commands = [talk]
    if adapter:
        merge = ["forgetless", "merge", str(out / "final"), "--out", str(out / "merged")]
        commands.append(shlex.join(merge))
    return "\n" + "\n".join(
        f"{'next:' if at == 0 else '     '} {command}" for at, command in enumerate(commands)
    )


def _short_name(name: Any) -> str:
    """The last part of a path or Hub name, cut where it is long."""
    shown = Path(str(name)).name if name else "text"
    return shown if len(shown) <= LONGEST_LABEL else shown[: LONGEST_LABEL - 3] + "..."
