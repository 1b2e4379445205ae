"""Estimators, methods, verbs and options are records: every reference leads somewhere, every fact
is that of the code, and a new row is all that a new one takes.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable

import pytest

from conftest import unheld
from forgetless.cli import main
from forgetless.errors import OptionError
from forgetless.importance.entries import FactoredEntry
from forgetless.importance.importance import Importance
from forgetless.methods.method import MethodSteps
from forgetless.methods.table import loaded
from forgetless.model.loading import load_model
from forgetless.model.update import Update
from forgetless.options.estimators import ESTIMATORS, TRAINING_OPTIONS, Estimator, default_strength
from forgetless.options.methods import FAMILIES, METHODS, Method
from forgetless.options.model import ModelOptions
from forgetless.options.option import RUNNING, option
from forgetless.options.record import RecordOptions
from forgetless.options.reference import resolved
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import VERBS, Verb
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.path_recorder import PathRecorder


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.recorder])
def test_the_row_of_an_estimator_says_what_its_recorder_is(name):
    row = ESTIMATORS[name]
    recorder = resolved(row.recorder)
    assert recorder.estimator == name
    assert issubclass(recorder, PathRecorder if row.trains else ObservingRecorder)
    assert set(row.reads) <= {*RecordOptions.__dataclass_fields__}
    assert row.trains == (set(TRAINING_OPTIONS) <= set(row.reads))
    taken = set(inspect.signature(recorder).parameters)
    for name_of_option, argument in (("labels", "labels"), ("cov_rank", "rank")):
        assert (name_of_option in row.reads) == (argument in taken)
    assert row.strength is not None or not row.in_nats


@pytest.mark.parametrize("name", METHODS)
def test_the_row_of_a_method_names_functions_options_and_methods_that_there_are(name):
    row = METHODS[name]
    functions = [getattr(loaded(row), spec.name) for spec in dataclasses.fields(MethodSteps)]
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
    assert set(row.needed) <= set(known)
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


# The four examples of CONTRIBUTING.md, run: what stands here in this file is there in files of
# its own, and the rows stand in the tables.


class Magnitude(ObservingRecorder):
    """The mean size of each input column."""

    estimator = "magnitude"
    unit = "size of an input per token"
    needs_gradients = False

    def __init__(self, model, names="all-linear"):
        super().__init__(model, names)
        self._sizes = {}

    def _see(self, layer, x, d, counts):
        if self.leaders[layer.name] == layer.name:
            self._sizes[layer.name] = self._sizes.get(layer.name, 0) + x[counts].abs().sum(0)

    def _entries(self):
        entries = {}
        for layer in self.observed:
            means = self._sizes[self.leaders[layer.name]] / self.positions
            entries[layer.name] = FactoredEntry(means.new_ones(layer.shape[0], 1), means[:, None])
        return entries

    def _size(self, layer):
        return layer.shape[1]

    def _sums(self):
        return {"sizes": self._sizes}

    def _settings(self):
        return {}


def test_an_estimator_is_a_class_and_a_row(monkeypatch, model_folder, text_file, tmp_path, capsys):
    row = Estimator(
        help="mean size of the inputs",
        recorder=f"{__name__}:Magnitude",
        tier="factored",
        gradients=False,
    )
    monkeypatch.setitem(ESTIMATORS, "magnitude", row)
    file, model = str(tmp_path / "i.safetensors"), str(model_folder)
    words = ["record", model, "--general", str(text_file), "--out", file, "--device", "cpu"]
    assert main([*words, "--estimator", "magnitude"]) == 0
    importance = Importance.load(file)
    assert importance.info["estimator"] == "magnitude" and importance.tier == "factored"
    assert main([*words, "--estimator", "magnitude", "--rank", "2"]) == 2
    assert main([*words, "--estimator", "magnitud"]) == 2
    said = capsys.readouterr().err
    assert "--rank: not used by --estimator magnitude" in said and "did you mean 'magn" in said
    assert main(["plan", model, "--estimator", "magnitude", "--flops", "1e12"]) == 0
    with pytest.raises(OptionError, match="'magnitude' has no default strength"):
        default_strength("magnitude")


def halved(setup, model):
    """Scale the trained update in place."""
    Update(model).scale(setup.options.fraction)
    return {"fraction": setup.options.fraction}


@dataclasses.dataclass(frozen=True)
class MoreTuneOptions(TuneOptions):
    """TuneOptions with one more option, as it would stand there."""

    fraction: float | None = option(
        None,
        "halved: keep this fraction of the update [0.5]",
        group="method",
        at_least=0,
        below=1,
        later=True,
    )


@pytest.fixture
def tuning(monkeypatch, model_folder, text_file, tmp_path):
    """A function: more words -> exit code of `forgetless tune` with a method and an option more."""
    row = Method(
        help="half of the finished update",
        reads=("fraction",),
        settings={"fraction": 0.5},
        finish=f"{__name__}:halved",
    )
    monkeypatch.setitem(METHODS, "halved", row)
    verb = dataclasses.replace(VERBS["tune"], options=MoreTuneOptions)
    monkeypatch.setitem(VERBS, "tune", verb)
    words = ["tune", str(model_folder), "--data", str(text_file), "--out", str(tmp_path / "run")]
    words += ["--max-steps", "1", "--device", "cpu"]
    return lambda *more: main(unheld([*words, *more]))


def test_a_method_is_a_function_and_a_row(tuning, tmp_path):
    assert tuning("--method", "halved") == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["method"] == ["halved"] and run["finished"] == {"halved": {"fraction": 0.5}}
    assert METHODS["halved"].family == "baseline"


def test_an_option_is_a_row(tuning, tmp_path, capsys):
    assert tuning("--method", "halved", "--fraction", "1.5") == 2
    with pytest.raises(SystemExit, match="2"):
        tuning("--method", "halved", "--fractoin", "0.5")
    said = capsys.readouterr().err
    assert "--fraction must be below 1, found 1.5" in said
    assert "did you mean '--fraction'" in said
    assert tuning("--method", "halved", "--fraction", "0.25", "--quiet") == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["finished"] == {"halved": {"fraction": 0.25}}
    assert run["configuration"]["fraction"] == 0.25


def test_an_option_of_a_method_is_not_ignored_by_others(tuning, capsys):
    assert main(["tune", "--help-all"]) == 0
    assert "--fraction X" in capsys.readouterr().out.split("holding:")[1].split("budget:")[0]
    assert tuning("--method", "plain", "--fraction", "0.5") == 2
    assert "--fraction is not used by --method plain; it is for halved" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class CountOptions(ModelOptions):
    """Options of `forgetless count`: how many parameters a model has."""

    full_number: bool = option(False, "all digits", group="output", decides=RUNNING)


def count(options):
    """How many parameters a model has, as text, which is printed."""
    parameters = sum(p.numel() for p in load_model(options).parameters())
    return f"{parameters} parameters" if options.full_number else f"{parameters:.1e} parameters"


def test_a_verb_is_a_function_its_options_and_a_row(monkeypatch, model_folder, tmp_path, capsys):
    row = Verb(
        help="count the parameters of a model",
        example="forgetless count MODEL",
        options=CountOptions,
        needed=("model",),
        run=f"{__name__}:count",
    )
    monkeypatch.setitem(VERBS, "count", row)
    assert main(["count", str(model_folder)]) == 0
    assert capsys.readouterr().out.endswith("parameters\n")
    (tmp_path / "c.yaml").write_text(f"model: {model_folder}\nfull_number: true\n")
    assert main(["count", "--config", str(tmp_path / "c.yaml")]) == 0
    assert capsys.readouterr().out.split()[0].isdigit()
    assert main(["count"]) == 2
    assert "missing MODEL; for example: forgetless count MODEL" in capsys.readouterr().err
    assert main(["cuont", "x"]) == 2
    assert "did you mean 'count'" in capsys.readouterr().err
    assert main([]) == 0
    assert "count the parameters of a model" in capsys.readouterr().out
