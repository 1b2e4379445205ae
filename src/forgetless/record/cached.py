"""The importance that `tune` holds a base by where no file is given: found in the cache, or
recorded now, once for this base.

    recording = default_recording(options, tokenizer)     # what `record MODEL` does
    importance, file = recorded_for(recording, model, tokenizer)

The name of the file follows from all that decides what is in it: the weights of the base, the
tokens that its tokenizer and template make of our prompts, and the options of the recording.
Another fine-tune, another template or other --prompts have a file of their own; the seed of a run
makes no difference. A damaged file is recorded again.

While one process records, others wait for it and then read its file. An interrupted recording goes
on: the answers of the model are kept as they are sampled, and so is the recorder's state. Under
torchrun all processes record together, as `record` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.data.own_text import own_text
from forgetless.data.selftext import Opening, stop_tokens
from forgetless.errors import FileError
from forgetless.evaluate.own_answers import (
    OWN_WORDS,
    answer_length,
    default_kind,
    own_openings,
    sampling_seconds,
)
from forgetless.files.atomic import clear_temporaries, discard
from forgetless.files.cache import cached_file, check_cache
from forgetless.files.lock import in_turn
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.fingerprint import exact_fingerprint
from forgetless.model.loading import seed_and_threads
from forgetless.options.holding import RECORDING
from forgetless.options.model import OWN_TEXT_OPTIONS, ModelOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record import state as recording_state
from forgetless.record.recording import record_on
from forgetless.record.state import CalibratedState, ObservedState, TrainedState
from forgetless.record.text import general_text
from forgetless.report.numbers import duration

logger = logging.getLogger("forgetless")
# What the cache calls importance files.
KIND = "importance"
# Tokens that a forward pass is timed on.
TIMED = 256
# How many times the time of a forward pass it takes to observe as much text: there and back, with
# the products of inputs and of gradients.
FORWARD_PASSES = 4


def default_recording(options: RecordOptions | TuneOptions, tokenizer: Any) -> RecordOptions:
    """The options of the recording that `tune` holds by where it is given no file: those of
    `record` by default, on the model and the prompts that `options` name.
    """
    shared = {field.name for field in dataclasses.fields(ModelOptions)} - {"seed"}
    given = {name: getattr(options, name) for name in (*sorted(shared), *OWN_TEXT_OPTIONS)}
    general = default_kind(tokenizer)
    return resolve(RecordOptions, {**given, **RECORDING, "general": general, "resume": True})


def recorded_for(
    options: RecordOptions, model: nn.Module, tokenizer: Any
) -> tuple[Importance, Path]:
    """The importance of the bare base `model` by this recording, and its file in the cache;
    recorded now where it is not there.

    Raises ValueError, before anything long, where the model cannot be recorded or the cache not be
    written.
    """
    wanted = own_text(options, options.general)
    assert wanted is not None  # the default records on what the model says itself
    openings = own_openings(model, tokenizer, wanted, "record")
    length = answer_length(model, wanted.length)
    path = _file_of(options, model, tokenizer, openings, length)
    importance = _whole_file(path)
    if importance is None:
        check_cache(KIND)
        with _alone_at(path):
            importance = _whole_file(path)
            if importance is None:
                seconds = _seconds_to_record(model, tokenizer, openings, length)
                importance = _record_into(options, model, tokenizer, path, seconds)
    return importance, path


def _file_of(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    openings: Sequence[Opening],
    length: int,
) -> Path:
    """Where the file of this recording lies, on answers of at most `length` tokens."""
    elsewhere = {*(field.name for field in dataclasses.fields(ModelOptions)), "prompts"}
    settings = recording_state.comparable(options)
    made_of = [
        exact_fingerprint(model),
        sorted(stop_tokens(model, tokenizer)),
        length,
        [[opening.id, *opening.ids] for opening in openings],
        {name: value for name, value in settings.items() if name not in elsewhere},
    ]
    return cached_file(KIND, made_of, ".safetensors")


def _whole_file(path: Path) -> Importance | None:
    """The importance in the file, said with where it is from; None where one of the processes has
    no whole file there.
    """
    importance = None
    if path.is_file():
        try:
            importance = Importance.load(path)
        except FileError as error:
            logger.warning("%s; it is recorded again", error)
    if not all(distributed.collect(importance is not None)):
        return None
    if importance is not None:
        about = importance.info.get("data", {})
        then = datetime.datetime.fromtimestamp(path.stat().st_mtime)
        logger.info(
            "importance of this base is in the cache, recorded on %s on %s tokens of what it says "
            "itself (%s): %s",
            then.strftime("%Y-%m-%d"),
            f"{about.get('tokens', 0):,}",
            about.get("source"),
            path,
        )
    return importance


@contextlib.contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Hold the lock of the file; in several processes the first has it for all of them."""
    if not distributed.first():
        yield
        return
    with in_turn(path, "another process records the importance of this base: waiting for it"):
        clear_temporaries(path)
        yield


def _record_into(
    options: RecordOptions, model: nn.Module, tokenizer: Any, path: Path, seconds: float
) -> Importance:
    """Record into the file, which takes about so many seconds, and read it as later runs will."""
    options = dataclasses.replace(options, out=str(path))
    state = _state_to_go_on_from(options)
    logger.info(
        "no importance of this base is in the cache, so it is recorded now, once, on %s; this "
        "takes about %s and writes %s",
        OWN_WORDS[str(options.general)],
        duration(seconds),
        path,
    )
    if distributed.first():
        discard(path)  # a damaged one, which is no file of ours any more
    seed_and_threads(options)
    record_on(options, model, tokenizer, general_text(options, model, tokenizer), state)
    return Importance.load(path)


def _state_to_go_on_from(options: RecordOptions) -> TrainedState | ObservedState | None:
    """What an interrupted recording of one process has left; None where it is not there, or cannot
    be gone on with, which is said.
    """
    place = recording_state.place(options)
    if distributed.running() or not place.is_file():
        discard(place)
        return None
    try:
        state = recording_state.load_state(options)
    except ValueError as error:
        logger.warning("%s; the recording begins again", error)
        discard(place)
        return None
    assert not isinstance(state, CalibratedState)  # the default does not calibrate
    return state


def _seconds_to_record(
    model: nn.Module, tokenizer: Any, openings: Sequence[Opening], length: int
) -> float:
    """About how long the recording takes, by a few forward passes now."""
    tokens = sum(len(opening.ids) + length for opening in openings)
    forward = tokens * _seconds_of_a_token(model, max(len(o.ids) for o in openings) + length)
    return sampling_seconds(model, tokenizer, openings, length) + FORWARD_PASSES * forward


def _seconds_of_a_token(model: nn.Module, length: int) -> float:
    """How long a forward pass takes for a token of a text of `length` tokens."""
    width = min(length, TIMED)
    ids = torch.zeros(max(1, TIMED // width), width, dtype=torch.long)
    ids = ids.to(next(model.parameters()).device)
    seconds = []
    for _ in range(2):  # the first one may have to warm up
        started = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False).logits.sum().item()
        seconds.append(time.perf_counter() - started)
    return min(seconds) / ids.numel()
