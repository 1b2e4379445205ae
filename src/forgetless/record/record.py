"""record(): stage 1, from general text to an importance file.

Estimators of the path integral (Song et al. 2025, arXiv 2501.13669) wrap the model with LoRA and
train briefly on general text, without clipping, while the recorder watches. The others make passes
over the text with the bare model. Whatever can be refused is refused before that.

A state is saved every `save_steps` steps beside the file to write (`FILE.state`), and `--resume`
goes on from it with the same result as an uninterrupted run. With `--calibrate` the file is written
when the importance is there, and again with its calibration.

In several processes (torchrun) each takes a shard of every step, or of the batches to observe. The
importance is that of one process, to rounding, and the first process writes it; each saves a state
of its own.

    record(options)        # writes options.out
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.files.hub import ready
from forgetless.files.lock import only_writer
from forgetless.files.outputs import check_new_file, local_inputs
from forgetless.files.provenance import environment
from forgetless.importance.controls import uniform
from forgetless.importance.file import is_importance
from forgetless.importance.importance import Importance, push_importance
from forgetless.importance.info import BaseModel, Origin
from forgetless.model import distributed
from forgetless.model.fingerprint import fingerprint
from forgetless.model.loading import load_model, load_tokenizer, seed_and_threads
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.record import state as recording_state
from forgetless.record.calibrate import add_calibration, written_before
from forgetless.record.checks import check_record_options
from forgetless.record.observing import by_observing
from forgetless.record.saving import with_origin, write_importance
from forgetless.record.state import CalibratedState, ObservedState, TrainedState
from forgetless.record.text import (
    RecordingText,
    check_text,
    general_text,
    kept_answers,
    with_general,
)
from forgetless.record.training import by_training

logger = logging.getLogger("forgetless")


def record(options: RecordOptions) -> Importance:
    """Record importance as `options` say, write it to `options.out` and return it.

    Raises ValueError or OptionError before anything long begins.
    """
    distributed.start(options.device)
    check_record_options(options)
    check_new_file(options.out, is_importance, local_inputs(options))
    recording_state.check_place(options)
    repository = _repository(options)
    with only_writer(options.out, folder=False):
        tokenizer = load_tokenizer(options)
        options = with_general(options, tokenizer)
        state = recording_state.load_state(options)
        seed_and_threads(options)
        model = load_model(options)
        text = general_text(options, model, tokenizer)
        if isinstance(state, CalibratedState):
            importance = written_before(options, text, state)
        else:
            importance = record_on(options, model, tokenizer, text, state)
        if options.calibrate:
            importance = add_calibration(options, model, tokenizer, importance, text, state)
    if repository:
        logger.info("pushed to %s", push_importance(importance, repository))
    return importance


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


def _repository(options: RecordOptions) -> str | None:
    """The Hub repository to upload to, ready to take the file; None where nothing is uploaded from
    here.
    """
    if not options.push_to_hub or not distributed.first():
        return None
    return ready(options.push_to_hub, private=options.private)
