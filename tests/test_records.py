"""Estimators, methods, verbs and options are records: every reference leads somewhere, every fact
is that of the code, and a new row is all that a new one takes.
"""

import inspect

import pytest

from forgetless.options.estimators import ESTIMATORS, TRAINING
from forgetless.options.record import RecordOptions
from forgetless.options.reference import resolved
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.path_recorder import PathRecorder


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.recorder])
def test_the_row_of_an_estimator_says_what_its_recorder_is(name):
    row = ESTIMATORS[name]
    recorder = resolved(row.recorder)
    assert recorder.estimator == name
    assert issubclass(recorder, PathRecorder if row.trains else ObservingRecorder)
    assert set(row.reads) <= {*RecordOptions.__dataclass_fields__}
    assert row.trains == (set(TRAINING) <= set(row.reads))
    taken = set(inspect.signature(recorder).parameters)
    for option, argument in (("labels", "labels"), ("cov_rank", "rank")):
        assert (option in row.reads) == (argument in taken)
    assert row.strength is not None or not row.in_nats
