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

    record(options)        # writes options.out, or without it a file in the cache (cached.py)
"""

from __future__ import annotations

import logging

from forgetless.files.hub import ready
from forgetless.files.lock import only_writer
from forgetless.files.outputs import check_new_file, local_inputs
from forgetless.importance.file import is_importance
from forgetless.importance.importance import Importance, push_importance
from forgetless.model import distributed
from forgetless.model.linear import matching
from forgetless.model.loading import load_tokenizer, seed_and_threads
from forgetless.model.precision import load_to_train
from forgetless.options.record import RecordOptions
from forgetless.record import state as recording_state
from forgetless.record.cached import default_recording, recorded_for
from forgetless.record.calibrate import add_calibration, written_before
from forgetless.record.checks import check_record_options
from forgetless.record.recording import record_on
from forgetless.record.state import CalibratedState
from forgetless.record.text import general_text, with_general

logger = logging.getLogger("forgetless")


def record(options: RecordOptions) -> Importance:
    """Record importance as `options` say, write it to `options.out` and return it.

    Without `options.out` it is what `tune` records by itself, in the cache; what lies there already
    is not recorded again. Raises ValueError or OptionError before anything long begins.
    """
    distributed.start(options.device)
    check_record_options(options)
    if options.out:
        check_new_file(options.out, is_importance, local_inputs(options))
        recording_state.check_place(options)
        recording_state.check_unfinished(options)
    repository = _repository(options)
    importance = _into_file(options) if options.out else _into_cache(options)
    if repository:
        logger.info("pushed to %s", push_importance(importance, repository))
    return importance


def _into_file(options: RecordOptions) -> Importance:
    """Record into the file that --out names."""
    with only_writer(options.out, folder=False):
        tokenizer = load_tokenizer(options)
        options = with_general(options, tokenizer)
        state = recording_state.load_state(options)
        seed_and_threads(options)
        model = load_to_train(options)
        matching(model, options.targets)  # refused before any text is read or sampled
        text = general_text(options, model, tokenizer)
        if isinstance(state, CalibratedState):
            importance = written_before(options, text, state)
        else:
            importance = record_on(options, model, tokenizer, text, state)
        if options.calibrate:
            importance = add_calibration(options, model, tokenizer, importance, text, state)
    return importance


def _into_cache(options: RecordOptions) -> Importance:
    """Record into the cache, unless it is there."""
    tokenizer = load_tokenizer(options)
    recording = default_recording(options, tokenizer)
    seed_and_threads(options)
    return recorded_for(recording, load_to_train(options), tokenizer)[0]


def _repository(options: RecordOptions) -> str | None:
    """The Hub repository to upload to, ready to take the file; None where nothing is uploaded from
    here.
    """
    if not options.push_to_hub or not distributed.first():
        return None
    return ready(options.push_to_hub, private=options.private)
