"""The importance file of a recording: what it says about its origin, and how it is written."""

from __future__ import annotations

from forgetless.data.own_text import own_text
from forgetless.importance.importance import Importance
from forgetless.importance.info import Origin, Settings
from forgetless.model import distributed
from forgetless.options.estimators import ESTIMATORS, TRAINING_OPTIONS
from forgetless.options.option import RUNNING, as_dict, deciding
from forgetless.options.record import RecordOptions
from forgetless.record import state as recording_state

# Options that are not among the settings in the file: model and text stand beside them, and the
# rest is no part of the result. The last three have always stood there, and files stay as they are.
NOT_IN_THE_FILE = {"model", "general", *deciding(RecordOptions, RUNNING)} - {
    "device",
    "threads",
    "save_steps",
}
# Options that say nothing where a text is recorded on.
OF_OWN_TEXT = {"prompts", "answers", "answer_length", "keep_answers"}


def with_origin(options: RecordOptions, recorded: Importance, origin: Origin) -> Importance:
    """What a recorder made, with where it comes from, in the tier that `options` ask for."""
    settings = {**_deciding_settings(options), **recorded.info["settings"]}
    info = {**recorded.info, **origin.info(), "settings": settings}
    anchors = recorded.anchors if options.keep_anchor else {}
    importance = Importance(recorded.entries, anchors, info)
    return importance.to_tier(options.tier) if options.tier else importance


def write_importance(options: RecordOptions, importance: Importance) -> None:
    """Write the file, once for all processes, then remove the saved states.

    A calibration that follows goes on from its own state, so then they stay.
    """
    if distributed.first():
        importance.save(options.out)
    distributed.barrier()  # states go when the file is there,
    if not options.calibrate:
        recording_state.place(options).unlink(missing_ok=True)
    distributed.barrier()  # and none is left once any process returns


def _deciding_settings(options: RecordOptions) -> Settings:
    """The options that made the importance what it is."""
    left_out = set(NOT_IN_THE_FILE)
    if own_text(options, options.general) is None:
        left_out |= OF_OWN_TEXT
    if not ESTIMATORS[options.estimator].trains:
        left_out |= set(TRAINING_OPTIONS)
    given = as_dict(options).items()
    return {name: value for name, value in given if name not in left_out and value is not None}
