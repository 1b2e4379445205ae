"""The updates of a calibration: short trainings of a LoRA adapter, each with its energy and what it
costs.

Nine of them: on three pieces of general text, of about 4, 8 and 16 thousand tokens, which makes
them narrow domains seen 4 to 15 times. Each piece is trained on at three combinations of strength
and rate, since updates that evade importance cost more per unit of energy.

    for update, measured in measured_updates(options, model, tokenizer, importance, pieces, part):
        measured.energy, measured.second        # while `model` still carries the update
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from forgetless.data.encoding import Encoded, batches
from forgetless.evaluate.paired import PairedText
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.importance.calibration import MeasuredUpdate, usual_strength
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter, without_adapter
from forgetless.model.loading import context_length
from forgetless.model.update import Update
from forgetless.options.estimators import in_nats
from forgetless.options.record import RecordOptions
from forgetless.options.tune_presets import TUNE_PRESETS
from forgetless.penalty.pull import Penalty
from forgetless.record.cost import measured_points, parabola
from forgetless.record.steps import EPOCH_SEEDS, Batch, step
from forgetless.report.terminal import progress

# Optimizer steps of one training.
STEPS = 60
# Tokens of a batch, about: 60 steps of so many read each piece 4 to 15 times.
STEP_TOKENS = 1024
# Rank and alpha of the adapter: what fine-tuning usually takes.
RANK, ALPHA = 8, 32.0
# The learning rate of `tune`, which the rates of the updates are given by.
RATE = float(TUNE_PRESETS["default"]["learning_rate"])
# (strength as a multiple of the usual one, learning rate) of the three updates on each piece: held
# updates cost 2.1 to 4.3 nats per unit of energy on the lab model, others 1.3 to 1.5 (LOG.md).
STRENGTHS_AND_RATES = ((1.0, 2 * RATE), (3.0, 2 * RATE), (1.0, RATE / 2))
# Nats that a unit of energy which is in nats costs, before any update was measured.
FIRST_COST = 2.0
# Tokens of a piece of a document, at most.
LONGEST = 2048


def measured_updates(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    importance: Importance,
    trained: Sequence[Sequence[Encoded]],
    part: PairedText | PairedAnswers,
    done: Sequence[MeasuredUpdate] = (),
) -> Iterator[tuple[Update, MeasuredUpdate]]:
    """Each update that is not `done`, while `model` carries it, with what was measured of it.

    `trained`: pieces of text to train on; `part`: what is measured on. `model` is bare before and
    afterwards.
    """
    updates = list(done)
    length = min(options.length, LONGEST, context_length(model))
    plans = [_Plan(rows, *how) for rows in trained for how in STRENGTHS_AND_RATES]
    with progress("calibrating", len(plans), unit="update", done=len(done)) as bar:
        for number, plan in enumerate(plans):
            if number < len(done):
                continue
            known = _usual_cost(updates)
            # Importance that is not in nats says nothing before an update was measured: at cost 0
            # the first one is not held.
            strength = plan.times * usual_strength(importance.info, known or 0.0)
            seed = options.seed + number
            torch.manual_seed(seed)
            adapted = add_adapter(model, names=options.targets, rank=RANK, alpha=ALPHA)
            penalty = Penalty(adapted, importance, strength=strength)
            data = _endless(plan.rows, length, tokenizer.pad_token_id, seed)
            _train(adapted, penalty, data, plan.rate)
            if known is None:
                known = FIRST_COST if in_nats(importance.info.get("estimator")) else 0.0
            update = Update(adapted)
            updates.append(_measured_update(adapted, update, penalty, part, plan, known))
            update.scale(1)
            yield update, updates[-1]
            without_adapter(adapted)
            bar.advance()


class _Plan(NamedTuple):
    """How one update is trained."""

    rows: Sequence[Encoded]
    times: float  # the strength, as a multiple of the usual one
    rate: float  # the learning rate at the first step


def _measured_update(
    model: nn.Module,
    update: Update,
    penalty: Penalty,
    part: PairedText | PairedAnswers,
    plan: _Plan,
    cost: float,
) -> MeasuredUpdate:
    """What the update that `model` carries costs; `cost`: nats that a unit of energy is taken to
    cost, by which the sizes are chosen that it is measured at.
    """
    energy = penalty.energy()
    points = measured_points(model, update, part, cost * energy)
    first, second, error = parabola(points, linear=isinstance(part, PairedText))
    how = {
        "documents": len(plan.rows),
        "strength": penalty.strength,
        "learning_rate": plan.rate,
        "steps": STEPS,
    }
    plain = [point.plain() for point in points]
    return MeasuredUpdate(energy, first, second, error, how, plain)


def _usual_cost(updates: Sequence[MeasuredUpdate]) -> float | None:
    """Nats that a unit of energy has cost so far; None where nothing did."""
    costs = [u.second / u.energy for u in updates if u.second > 0 and u.energy > 0]
    return statistics.geometric_mean(costs) if costs else None


def _train(model: nn.Module, penalty: Penalty, data: Iterator[Batch], rate: float) -> None:
    """STEPS steps under the pull, at a rate that falls to nothing.

    Raises ValueError where they diverge.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    with penalty.attach(optimizer):
        for number, batch in enumerate(itertools.islice(data, STEPS)):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / STEPS)
            loss, _ = step(model, optimizer, [batch])
            if not math.isfinite(loss):
                raise ValueError(
                    f"a training that calibrates diverged at step {number + 1} of {STEPS} (rate "
                    f"{rate:g}); use --dtype float32, or leave out "
                    "--calibrate: the importance is written"
                )


def _endless(rows: Sequence[Encoded], length: int, pad_id: int, seed: int) -> Iterator[Batch]:
    """Batches of about STEP_TOKENS tokens, epoch after epoch."""
    pieces = [
        (ids[i : i + length], scored[i : i + length])
        for ids, scored in rows
        for i in range(0, len(ids), length)
        if any(scored[i + 1 : i + length])
    ]
    rows_each = rows_of_batch(pieces)
    for epoch in itertools.count():
        shuffle_seed = EPOCH_SEEDS * seed + epoch
        yield from batches(pieces, batch_size=rows_each, pad_id=pad_id, shuffle_seed=shuffle_seed)


def rows_of_batch(pieces: Sequence[Encoded]) -> int:
    """Rows of a batch of about STEP_TOKENS tokens."""
    return max(1, round(STEP_TOKENS * len(pieces) / sum(len(ids) for ids, _ in pieces)))
