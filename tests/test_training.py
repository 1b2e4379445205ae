"""record and tune end to end on a tiny model: files, resuming, equivalences, and what reaches the
trainer's log.
"""

import gc
import json
import os
import random
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

from conftest import interrupt_after, unheld
from forgetless.errors import OptionError
from forgetless.files import room
from forgetless.importance.importance import Importance
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record import observing
from forgetless.record import training as path_training
from forgetless.record.kronecker import Kronecker
from forgetless.record.record import record
from forgetless.tune.base import load_importance
from forgetless.tune.merge import merge
from forgetless.tune.trainer import train_from
from forgetless.tune.tune import tune


@pytest.fixture
def recorded(model_folder, text_file, tmp_path):
    """A function: options -> importance recorded on the tiny model."""

    def run(**given):
        options = {
            "model": str(model_folder),
            "general": str(text_file),
            "out": str(tmp_path / "i.safetensors"),
            "estimator": "path",
            "rank": 2,
            "epochs": 2,
            "batch_size": 3,
            "accumulation": 2,
            "learning_rate": 1e-2,
            "save_steps": 1,
            "overwrite": True,
            **given,
        }
        return record(resolve(RecordOptions, options))

    return run


@pytest.fixture
def tuned(model_folder, tmp_path):
    """A function: options -> the run of tuning the tiny model on new text."""
    rng = random.Random(7)
    path = tmp_path / "domain.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "prompt": f"Question {rng.choice('abcd')} ?",
                    "completion": " yes no " + rng.choice("abcd"),
                }
            )
            for _ in range(32)
        )
    )

    def run(**given):
        options = {
            "model": str(model_folder),
            "data": str(path),
            "out": str(tmp_path / "run"),
            "rank": 2,
            "batch_size": 4,
            "accumulation": 1,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "log_steps": 1,
            "device": "cpu",
            **given,
        }
        return tune(resolve(TuneOptions, unheld(options)))

    return run


def factors(folder):
    return load_file(folder / "final" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_record_writes_a_file_with_provenance_and_cleans_up(recorded, tmp_path):
    recorded()
    loaded = Importance.load(tmp_path / "i.safetensors")
    info = loaded.info
    assert len(loaded) == 14 and len(loaded.anchors) == 14
    assert (
        info["settings"]["steps"] == 8
        and info["settings"]["epochs"] == 2
        and info["data"]["documents"] == 24
    )
    assert (
        len(info["data"]["sha256"]) == len(info["model"]["fingerprint"]) == 64
        and info["timings"]["train_seconds"] > 0
    )
    assert all(value > 0 for value in info["norms"].values())
    assert not (tmp_path / "i.safetensors.state").exists()


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_interrupted_recording_resumes_to_the_same_file(recorded, tmp_path, monkeypatch, stop):
    whole = recorded(dropout=0.1)
    calls = 0
    step = path_training.step

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(path_training, "step", interrupted)
    out = tmp_path / "j.safetensors"
    with pytest.raises(KeyboardInterrupt):
        recorded(dropout=0.1, out=str(out))
    assert not out.exists()
    monkeypatch.setattr(path_training, "step", step)
    with pytest.raises(OptionError, match="learning_rate"):
        recorded(dropout=0.1, out=str(out), resume=True, learning_rate=0.5)
    parted = recorded(dropout=0.1, out=str(out), resume=True)
    assert all(torch.equal(whole[name].values, parted[name].values) for name in whole)


@pytest.mark.parametrize("stop", [1, 8, 11])
def test_recording_in_groups_resumes_to_the_file_of_one_pass(
    model_folder, text_file, tmp_path, monkeypatch, stop
):
    def run(name, **given):
        options = {
            "model": str(model_folder),
            "general": str(text_file),
            "out": str(tmp_path / name),
            "cov_rank": 4,
            "batch_size": 3,
            "save_steps": 1,
            "labels": "sampled",
            **given,
        }
        return record(resolve(RecordOptions, options))

    observe, calls = Kronecker.observe, 0

    def interrupted(*arguments, **batch):
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return observe(*arguments, **batch)

    run("whole")  # 8 batches
    monkeypatch.setattr(Kronecker, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("parted", groups=2)
    monkeypatch.setattr(Kronecker, "observe", observe)
    run("parted", resume=True)  # in the groups it was begun with
    whole, parted = load_file(tmp_path / "whole"), load_file(tmp_path / "parted")
    assert same(whole, parted)


def test_groups_follow_from_free_memory_and_are_announced(
    model_folder, text_file, tmp_path, monkeypatch, caplog
):
    options = {
        "model": str(model_folder),
        "general": str(text_file),
        "out": str(tmp_path / "k"),
        "cov_rank": 4,
    }
    needed = (
        4 * 2 * (16**2 * 6 + 8**2 * 2 + 24**2 * 3)
        # Two blocks: q, o, down and the inputs of qkv, o, gate and up; k, v; gate, up and the
        # input of down.
    )
    with caplog.at_level("INFO", "forgetless"):
        monkeypatch.setattr(observing, "free_memory", lambda: 2 * needed)
        record(resolve(RecordOptions, options))
        assert "--groups" not in caplog.text and "1 pass" in caplog.text
        monkeypatch.setattr(observing, "free_memory", lambda: 2 * needed - 1)
        record(resolve(RecordOptions, {**options, "out": str(tmp_path / "l")}))
    assert "--groups 2: the sums of all weights take" in caplog.text
    assert same(load_file(tmp_path / "k"), load_file(tmp_path / "l"))


def test_free_memory_is_within_what_the_machine_has():
    free = room.free_memory()
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        pytest.skip("the system does not say how much memory there is")
    assert free is None or 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_record_on_text_sampled_from_the_model_itself(recorded):
    importance = recorded(general="self", answers=6, answer_length=12, epochs=1)
    assert importance.info["data"]["source"] == "self" and importance.info["data"]["documents"] == 6


def test_strength_zero_is_plain_fine_tuning_bit_for_bit(recorded, tuned, tmp_path):
    recorded()
    tuned(out=str(tmp_path / "plain"))
    tuned(out=str(tmp_path / "zero"), importance=str(tmp_path / "i.safetensors"), strength=0.0)
    tuned(out=str(tmp_path / "held"), importance=str(tmp_path / "i.safetensors"), strength=10.0)
    assert same(factors(tmp_path / "plain"), factors(tmp_path / "zero"))
    assert not same(factors(tmp_path / "plain"), factors(tmp_path / "held"))


def test_the_default_recipe_needs_neither_estimator_nor_strength(
    model_folder, text_file, tuned, tmp_path
):
    path = str(tmp_path / "d.safetensors")
    record(
        resolve(RecordOptions, {"model": str(model_folder), "general": str(text_file), "out": path})
    )
    run = tuned(importance=path)
    assert (
        Importance.load(path).tier == "kronecker:24"
        and run["configuration"]["strength"] == ESTIMATORS["kronecker"].strength
        and run["energy"] > 0
    )
    uniform = str(tmp_path / "u.safetensors")
    record(
        resolve(RecordOptions, {"model": str(model_folder), "estimator": "uniform", "out": uniform})
    )
    with pytest.raises(OptionError, match="no default strength"):
        tuned(importance=uniform, out=str(tmp_path / "other"))


def test_the_penalty_holds(recorded, tuned, tmp_path):
    """More strength, less energy at the end: the update stays away from what matters."""
    importance = recorded()
    energies = []
    for strength in (1e-6, 1e-2, 1.0):
        tuned(
            out=str(tmp_path / f"s{strength}"),
            importance=str(tmp_path / "i.safetensors"),
            strength=strength,
            max_steps=20,
        )
        held = factors(tmp_path / f"s{strength}")
        energy = 0.0
        for name in importance:
            A = held[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]
            B = held[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            energy += float(importance[name].energy(32 / 2 * B @ A))
        energies.append(energy)
    assert energies[0] > 10 * max(
        energies[1:]
    )  # the floor of the strong ones is the size of an Adam step


def test_accumulation_gives_the_same_update(recorded, tuned, tmp_path):
    """4 x 1 against 1 x 4, dropout off: the same factors to 1e-5."""
    recorded()
    common = {"importance": str(tmp_path / "i.safetensors"), "strength": 0.1}
    tuned(out=str(tmp_path / "a"), batch_size=4, accumulation=1, **common)
    tuned(out=str(tmp_path / "b"), batch_size=1, accumulation=4, **common)
    a, b = factors(tmp_path / "a"), factors(tmp_path / "b")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_resuming_equals_an_uninterrupted_run(recorded, tuned, tmp_path, monkeypatch):
    recorded()
    common = {
        "importance": str(tmp_path / "i.safetensors"),
        "save_steps": 2,
        "dropout": 0.1,
    }  # no strength: what suits the importance, also when going on
    tuned(out=str(tmp_path / "whole"), **common)
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        tuned(out=str(tmp_path / "parted"), **common)
    with pytest.raises(ValueError, match="--resume"):
        tuned(out=str(tmp_path / "parted"), **common)
    with pytest.raises(
        OptionError, match=rf"strength={ESTIMATORS['path'].strength!r} \(now 0\.2\)"
    ):
        tuned(out=str(tmp_path / "parted"), resume=True, **{**common, "strength": 0.2})
    tuned(out=str(tmp_path / "parted"), resume=True, **common)
    assert same(factors(tmp_path / "whole"), factors(tmp_path / "parted"))


def test_resuming_after_the_last_step_takes_no_further_step(tuned, tmp_path):
    """As after Ctrl-C while the numbers after training were measured."""
    first = tuned(save_steps=2)
    before = factors(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "final")
    again = tuned(save_steps=2, resume=True)
    assert same(before, factors(tmp_path / "run"))
    assert [e["loss"] for e in again["log"] if "loss" in e] == [
        e["loss"] for e in first["log"] if "loss" in e
    ]


def test_energy_and_pull_reach_log_console_and_tensorboard(recorded, tuned, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorded()
    run = tuned(importance=str(tmp_path / "i.safetensors"), strength=0.1, report_to="tensorboard")
    logged = [entry for entry in run["log"] if "loss" in entry]
    assert len(logged) == 6 and all(
        {"energy", "pull_norm", "pull_ratio"} <= entry.keys() for entry in logged
    )
    assert logged[-1]["energy"] > 0 and run["energy"] == logged[-1]["energy"]
    printed = capsys.readouterr()
    assert "energy" in printed.err and "'energy'" not in printed.out + printed.err
    event = next((tmp_path / "run").rglob("events.*"))
    found = EventAccumulator(str(event.parent))
    found.Reload()
    assert {"train/energy", "train/pull_norm", "train/pull_ratio"} <= set(found.Tags()["scalars"])


def test_the_paper_preset_goes_on_from_the_recorded_adapter(recorded, tuned, tmp_path):
    recorded(preset="paper", rank=2)
    run = tuned(
        preset="paper",
        importance=str(tmp_path / "i.safetensors"),
        rank=2,
        epochs=1.0,
        dropout=0.0,
        max_steps=2,
    )
    assert run["configuration"]["anchor"] == "recorded" and run["configuration"]["tau"] == 1e-8
    assert run["log"][0]["energy"] == pytest.approx(0.0, abs=1e-4)
    with pytest.raises(OptionError, match="rank 2, found --rank 4"):
        tuned(preset="paper", importance=str(tmp_path / "i.safetensors"), rank=4, overwrite=True)


def test_full_fine_tuning_and_merging_load_without_forgetless(recorded, tuned, tmp_path, text_file):
    from transformers import AutoModelForCausalLM

    recorded()
    run = tuned(
        full=True, importance=str(tmp_path / "i.safetensors"), strength=1.0, general=str(text_file)
    )
    assert run["forgetting"]["nats"] is not None and run["before"]["general"]["documents"] == 24
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tuned(out=str(tmp_path / "lora"))
    merge(str(tmp_path / "lora" / "final"), str(tmp_path / "merged"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_non_finite_loss_stops_before_the_step_and_keeps_the_checkpoint(tuned, tmp_path):
    with pytest.raises(ValueError, match="non-finite loss or gradient at step 2"):
        tuned(learning_rate=1e30, save_steps=1, max_grad_norm=0.0)
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert (
        not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "run.json").exists()
    )


def test_a_finished_run_is_not_overwritten_unasked(tuned):
    tuned()
    with pytest.raises(ValueError, match="finished run"):
        tuned()
    tuned(overwrite=True)


def test_of_an_offloaded_importance_nothing_keeps_the_first_copy(
    recorded, tuned, tmp_path, monkeypatch
):
    recorded()
    first, alive = [], []

    def loaded(options):
        importance, path = load_importance(options)
        first.append(weakref.ref(importance))
        return importance, path

    def trained(*arguments):
        gc.collect()
        alive.append(first[0]() is not None)
        return train_from(*arguments)

    monkeypatch.setattr("forgetless.tune.tune.load_importance", loaded)
    monkeypatch.setattr("forgetless.tune.tune.train_from", trained)
    tuned(importance=str(tmp_path / "i.safetensors"), offload_importance=True)
    assert alive == [False]
