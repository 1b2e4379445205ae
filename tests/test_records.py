"""Estimators, methods, verbs and options are records: every reference leads somewhere, every fact
is that of the code, and a new row is all that a new one takes.
"""

import dataclasses
import inspect
from collections.abc import Callable

import pytest

from forgetless.methods.method import Steps
from forgetless.methods.table import loaded
from forgetless.options.estimators import ESTIMATORS, TRAINING
from forgetless.options.methods import FAMILIES, METHODS
from forgetless.options.record import RecordOptions
from forgetless.options.reference import resolved
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import VERBS
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


@pytest.mark.parametrize("name", METHODS)
def test_the_row_of_a_method_names_functions_options_and_methods_that_there_are(name):
    row = METHODS[name]
    functions = [getattr(loaded(row), spec.name) for spec in dataclasses.fields(Steps)]
    assert all(function is None or callable(function) for function in functions)
    assert row.check is None or callable(resolved(row.check))
    assert {*row.needs, *row.reads, *row.settings} <= {*TuneOptions.__dataclass_fields__}
    assert row.family in FAMILIES and set(row.refuses) <= set(METHODS)
    assert row.help and not row.help.endswith(".")


@pytest.mark.parametrize("name", VERBS)
def test_the_row_of_a_verb_names_functions_and_options_that_there_are(name):
    row = VERBS[name]
    assert isinstance(row.run, Callable) or callable(resolved(row.run))
    known = row.options.__dataclass_fields__
    assert row.example.startswith(f"forgetless {name}")
    assert isinstance(row.needed, Callable) or set(row.needed) <= set(known)
    for values in (row.presets or {}).values():
        assert set(values) <= set(known)


def test_several_domains_are_tuned_in_turn():
    given = {"model": "m", "out": "o"}
    for data, more, function in (
        ("a", {}, "tune.tune:tune"),
        ("a,b", {}, "tune_in_turn"),
        ("a", {"after": "run"}, "tune_in_turn"),
    ):
        reference = VERBS["tune"].run(VERBS["tune"].resolve({**given, "data": data, **more}))
        assert reference.endswith(function) and callable(resolved(reference))
