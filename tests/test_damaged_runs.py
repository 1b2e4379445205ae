"""What tune goes on from may be damaged, or of somebody else: run.json behind --after, a
checkpoint, inputs.json. Each is refused in one sentence that names the place.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from forgetless.budget.controller import Controller
from forgetless.budget.probe import Probe
from forgetless.cli import exit_code, main
from forgetless.errors import FileError, OptionError
from forgetless.files.lock import only_writer
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.sequence.domains import earlier_of
from forgetless.tune.run_folder import INPUTS, check_inputs, last_checkpoint
from forgetless.tune.trainer import train_from

THEN = {
    "model": "m",
    "data": "lang=en/train.jsonl",
    "data_split": "train",
    "eval_data": "held.jsonl",
    "eval_split": None,
    "importance": "i.safetensors",
}
HELD = {"a": {"name": "a", "train": "a.jsonl", "held": "h.jsonl", "held_split": None}}
MATRIX = {"domains": ["a"], "matrix": [[1.0]], "accuracy_domains": []}


@pytest.fixture
def earlier(tmp_path):
    """A function: what the run.json of an earlier run holds -> what is gone on from."""

    def read(run, adapter=None):
        folder = tmp_path / "earlier"
        (folder / "final").mkdir(parents=True, exist_ok=True)
        adapter = {"peft_type": "LORA"} if adapter is None else adapter
        (folder / "final" / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "run.json").write_text(json.dumps(run))
        options = {"model": "m", "data": "d.jsonl", "out": "o", "after": str(folder)}
        return earlier_of(resolve(TuneOptions, options))

    return read


def test_a_run_is_gone_on_from_by_what_its_file_says(earlier):
    [domain], _, importance = earlier({"configuration": THEN})
    assert (domain.name, domain.held, importance) == ("train", "held.jsonl", "i.safetensors")
    [domain], _, _ = earlier({"configuration": THEN, "sequence": {**MATRIX, "held": HELD}})
    assert (domain.name, domain.train, domain.split) == ("a", "a.jsonl", None)


@pytest.mark.parametrize(
    "run",
    [
        [],
        {"configuration": []},
        {"configuration": {**THEN, "data": None}},
        {"configuration": {**THEN, "data": ["d.jsonl"]}},
        {"configuration": {**THEN, "eval_data": {"a": 1}}},
        {"configuration": {**THEN, "importance": 3}},
        {"configuration": {**THEN, "importance": "auto"}, "importance": "text"},
        {"configuration": THEN, "sequence": "no mapping"},
        {"configuration": THEN, "sequence": {"domains": ["a"]}},
        {"configuration": THEN, "sequence": {**MATRIX, "held": [1]}},
        {"configuration": THEN, "sequence": {**MATRIX, "held": {"a": {"name": "a"}}}},
        {"configuration": THEN, "sequence": {**MATRIX, "held": {"a": {**HELD["a"], "held": 1}}}},
    ],
)
def test_a_damaged_run_is_refused(earlier, run):
    with pytest.raises(FileError, match=r"run\.json"):
        earlier(run)


def test_runs_and_adapters_of_others_are_refused(earlier):
    with pytest.raises(ValueError, match="was not written by forgetless tune"):
        earlier({})
    with pytest.raises(OptionError, match="tuned on 'None'"):
        earlier({"configuration": {**THEN, "model": None}})
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        earlier({"configuration": THEN}, adapter=["LORA"])
    with pytest.raises(ValueError, match="of type None"):
        earlier({"configuration": THEN}, adapter={})


def written(folder, state):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"global_step": "2", "max_steps": 2},
        {"global_step": 2, "max_steps": None},
        {"global_step": 2, "max_steps": 2, "log_history": {}},
        {"global_step": 2, "max_steps": 2, "log_history": [1]},
        {"global_step": 2, "max_steps": 2, "stateful_callbacks": []},
        {"global_step": 2, "max_steps": 2, "of_a_later_version": 1},
    ],
)
def test_a_damaged_checkpoint_is_refused(state, tmp_path):
    place = written(tmp_path / "checkpoints" / "checkpoint-2", state)
    written(tmp_path / "checkpoints" / "checkpoint-best", {"global_step": 9, "max_steps": 9})
    assert last_checkpoint(tmp_path) == str(place)
    with pytest.raises(FileError, match=f"remove {place} to go on from the checkpoint before"):
        train_from(SimpleNamespace(args=SimpleNamespace(max_steps=2)), str(place))


@pytest.mark.parametrize(
    "attributes",
    [[], {}, {"cursor": None}, {"cursor": 0, "controller": 3}, {"cursor": 0, "controller": {}}],
)
def test_a_damaged_state_of_a_budget_is_refused(attributes):
    grip = SimpleNamespace(set=lambda strength: None, energy=None, divergence=None)
    probe = Probe(Controller(0.01, 1.0), grip)
    state = SimpleNamespace(stateful_callbacks={"Probe": {"attributes": attributes}})
    with pytest.raises(FileError, match="state of the budget is not what forgetless writes"):
        probe.restore(state)


def test_a_damaged_list_of_inputs_is_refused(tmp_path):
    (tmp_path / INPUTS).write_text("[1]")
    with pytest.raises(FileError, match=r"inputs\.json"):
        check_inputs({"training data": "0"}, tmp_path)


@pytest.mark.parametrize("length, fits", [(200, True), (243, True), (244, False), (255, False)])
def test_names_that_leave_no_room_for_what_stands_beside_them_are_refused(length, fits, tmp_path):
    path = tmp_path / ("n" * length)
    for kind in ({"folder": False}, {"folder": False, "becomes_folder": True}):
        if fits:
            with only_writer(path, **kind):
                assert (tmp_path / f".{path.name}.lock").exists()
        else:
            with pytest.raises(ValueError, match="expected at most 243"), only_writer(path, **kind):
                pytest.fail("started")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_standard_streams_are_no_failure(stream, tmp_path, monkeypatch):
    Importance({"a.weight": DenseEntry(torch.ones(2, 2))}).save(tmp_path / "i.safetensors")
    monkeypatch.setattr(sys, stream, None)
    assert main(["inspect", str(tmp_path / "i.safetensors")]) == 0
    assert main(["inspect", str(tmp_path / "gone.safetensors")]) == 1
    getattr(sys, stream).close()


def test_a_comparison_with_failed_runs_does_not_end_as_done():
    done, full = {"status": "done"}, {"status": "out of memory"}
    assert exit_code({"runs": [done, full]}) == 0
    assert exit_code({"runs": [done, {"status": "failed"}]}) == 1
