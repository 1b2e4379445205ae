"""One recording, from text that is encoded already to the importance file.

    importance = record_on(options, model, tokenizer, text, state=None)     # writes options.out

`record` does it for the file of its --out, cached.py for a file in the cache, and a sequence for
the domain that was learned last.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.files.provenance import environment
from forgetless.importance.controls import uniform
from forgetless.importance.importance import Importance
from forgetless.importance.info import BaseModel, Origin
from forgetless.model.fingerprint import fingerprint
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.record.observing import by_observing
from forgetless.record.saving import with_origin, write_importance
from forgetless.record.state import ObservedState, TrainedState
from forgetless.record.text import RecordingText, check_text, kept_answers
from forgetless.record.training import by_training

logger = logging.getLogger("forgetless")


def record_on(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    text: RecordingText,
    state: TrainedState | ObservedState | None,
) -> Importance:
    """Record on text that is encoded already, going on from `state` where there is one; writes
    `options.out`.

    Raises ValueError where the text is not that of the state, or differs between processes.
    """
    base = BaseModel(options.model, options.revision, fingerprint(model))
    device = str(next(model.parameters()).device)
    if ESTIMATORS[options.estimator].constant:
        recorded, seconds = uniform(model, options.targets), 0.0
    else:
        assert text.source is not None
        check_text(options, text.source, state)
        torch.manual_seed(options.seed)
        recorded, seconds = _estimated(options, model, tokenizer.pad_token_id, text, state)
    origin = Origin(base, text.source, seconds, environment(device))
    importance = with_origin(options, recorded, origin)
    if options.keep_answers:
        answers = kept_answers(options, model, tokenizer)
        importance = dataclasses.replace(importance, answers=answers)
    write_importance(options, importance)
    logger.info(
        "wrote %s: %d weights, tier %s, %.2f MiB, %.1f s",
        options.out,
        len(importance),
        importance.tier,
        Path(options.out).stat().st_size / 2**20,
        seconds,
    )
    return importance


def _estimated(
    options: RecordOptions,
    model: nn.Module,
    pad_id: int,
    text: RecordingText,
    state: TrainedState | ObservedState | None,
) -> tuple[Importance, float]:
    """Importance by the estimator that `options` name, and the seconds that it took."""
    if ESTIMATORS[options.estimator].trains:
        assert not isinstance(state, ObservedState)  # which another estimator saves
        return by_training(options, model, text, pad_id, state)
    assert not isinstance(state, TrainedState)
    return by_observing(options, model, text, pad_id, state)
