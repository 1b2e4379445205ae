"""Calibrating: what fine-tuning-like updates of a base model cost in general loss, or in divergence
from the base on its own answers where those are recorded on (importance/calibration.py has the
law).

kept apart   general documents that importance is not recorded on: half to train on, half to measure
             on (kept_apart.py)
updates      nine short trainings of a LoRA adapter on narrow pieces of that text (updates.py)
sizes        each update is measured at several sizes, and f s + q s^2 is fitted to what it cost.
             f is left out of the cost of energy: text that is trained on here is of the kind that
             is measured (cost.py)
gradient     of the recorded text at the base, as L R of rank 32 per weight (gradient.py); a
             divergence has none at the base, so that f is 0 there

    recorded, kept = apart(documents, tokenizer)
    importance = add_calibration(options, model, tokenizer, importance, text, None)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from forgetless.data.documents import Document, fingerprint_rows
from forgetless.data.encoding import Encoded, batches
from forgetless.errors import OptionError
from forgetless.evaluate.paired import content
from forgetless.evaluate.paired_answers import PairedAnswers
from forgetless.files.measured_json import DIVERGENCE
from forgetless.importance.calibration import Calibration, MeasuredUpdate
from forgetless.importance.importance import Importance
from forgetless.model.precision import load_to_train
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.record import state as recording_state
from forgetless.record.gradient import gradient
from forgetless.record.kept_apart import divided
from forgetless.record.state import CalibratedState, State
from forgetless.record.text import RecordingText
from forgetless.record.updates import measured_updates, rows_of_batch

logger = logging.getLogger("forgetless")
# Directions of the gradient that are kept for each weight. On two lab models rank 32 gave the
# first-order term of small-rate updates to within .01 nats of what was measured.
GRADIENT_RANK = 32


def written_before(
    options: RecordOptions, text: RecordingText, state: CalibratedState
) -> Importance:
    """The importance that an interrupted calibration is about: it was written before.

    Raises ValueError where the text is another one now, OptionError where the tier is.
    """
    recording_state.check_same_text(options, state, text.hash_of_kept_apart())
    importance = Importance.load(options.out)
    if options.tier and importance.tier != options.tier:
        raise OptionError(
            f"--tier {options.tier}: {options.out} has tier {importance.tier}, by which it is "
            "calibrated; give the same, or no --resume"
        )
    return importance


def add_calibration(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    importance: Importance,
    text: RecordingText,
    state: State | None,
) -> Importance:
    """`importance` with its calibration, written to `options.out` again.

    Updates that `state` holds are not measured again; after each further one it is saved anew.
    """

    def save(updates: Sequence[MeasuredUpdate]) -> None:
        hash_of_text = text.hash_of_kept_apart()
        recording_state.write(options, CalibratedState(hash_of_text, len(updates), list(updates)))

    done = state.calibrated if isinstance(state, CalibratedState) else []
    save(done)
    if ESTIMATORS[options.estimator].trains:  # which left their adapter in the model
        del model
        model = load_to_train(options)
    calibration = calibrated(
        options, model, tokenizer, importance, text.pieces, text.kept_apart, done, save
    )
    importance = dataclasses.replace(importance, calibration=calibration)
    importance.save(options.out)
    recording_state.place(options).unlink()
    return importance


def calibrated(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    importance: Importance,
    recorded: Sequence[Encoded],
    kept: Sequence[Document],
    done: Sequence[MeasuredUpdate] = (),
    save: Callable[[Sequence[MeasuredUpdate]], None] = lambda updates: None,
) -> Calibration:
    """The calibration of `importance` on its base `model`, which is bare before and afterwards.

    `recorded`: the text that importance was recorded on; `kept`: the documents kept apart. `done`:
    updates that were measured before an interruption; `save` is given all so far after each. Raises
    ValueError where the updates say nothing.
    """
    updates = list(done)
    trained, part = divided(model, tokenizer, kept)
    for _, update in measured_updates(options, model, tokenizer, importance, trained, part, done):
        updates.append(update)
        save(updates)
    measured_on: dict[str, Any] = {
        "documents": len(part),
        "tokens": int(part.tokens.sum()),
        "sha256": fingerprint_rows([content(document) for document in kept]),
    }
    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    if isinstance(part, PairedAnswers):
        measured_on["of"] = DIVERGENCE
    else:
        rows = rows_of_batch(recorded)
        pieces = list(batches(recorded, batch_size=rows, pad_id=tokenizer.pad_token_id))
        gradients = gradient(model, options.targets, pieces, rank=GRADIENT_RANK, seed=options.seed)
    try:
        calibration = Calibration(updates, gradients, measured_on)
    except ValueError as error:
        raise ValueError(f"{error}; {options.out} is written without it") from None
    logger.info("calibrated: %s", calibration.describe())
    return calibration
