"""What has changed at the same path is seen: the base model, the importance file, the replayed text
of a run that is resumed, and the base of a comparison.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import CONFIGS, interrupt_after
from forgetless.cli import main
from forgetless.compare.experiment_file import experiment_of
from forgetless.compare.recipes import record_all
from forgetless.model import fingerprint
from forgetless.model.fingerprint import files_fingerprint
from forgetless.options.model import ModelOptions
from forgetless.record import state as recording_state


def replaced(folder, seed=7):
    """Another model of the same shape in the place of one."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_other_weights_has_another_fingerprint(
    model_folder, tmp_path, whole, monkeypatch
):
    if not whole:
        monkeypatch.setattr(fingerprint, "WHOLE_UP_TO", 10_000)
    options = ModelOptions(model=str(model_folder))
    first = files_fingerprint(options)
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    assert files_fingerprint(ModelOptions(model=str(copy))) == first
    (copy / "notes.md").write_text("a card decides nothing")
    assert files_fingerprint(ModelOptions(model=str(copy))) == first
    weights = load_file(copy / "model.safetensors")
    save_file(
        {k: v + 1e-3 for k, v in weights.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    assert files_fingerprint(ModelOptions(model=str(copy))) != first


@pytest.mark.parametrize("estimator", ["path", "fisher"])
def test_record_does_not_go_on_over_another_model(
    estimator, model_folder, text_file, tmp_path, capsys, monkeypatch
):
    words = ["record", str(model_folder), "--general", str(text_file), "--estimator", estimator]
    words += ["--out", str(tmp_path / "i.safetensors"), "--save-steps", "1", "--quiet"]
    write = recording_state.write

    def interrupted(options, state):
        write(options, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recording_state, "write", interrupted)
        assert main(words) == 130
    kept = shutil.copytree(model_folder, tmp_path / "kept")
    replaced(model_folder)
    assert main([*words, "--resume"]) == 1
    assert "was made on another model than lies at" in capsys.readouterr().err
    shutil.rmtree(model_folder)
    shutil.copytree(kept, model_folder)
    assert main([*words, "--resume"]) == 0


def test_tune_does_not_go_on_with_other_files(
    model_folder, text_file, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "i.safetensors"
    record = ["record", str(model_folder), "--out", str(file), "--quiet", "--general"]
    assert main([*record, str(text_file), "--estimator", "fisher"]) == 0
    words = ["tune", str(model_folder), "--data", str(text_file), "--importance", str(file)]
    words += ["--method", "hold,replay", "--replay", str(tmp_path / "replay.jsonl")]
    words += ["--out", str(tmp_path / "run"), "--max-steps", "2", "--save-steps", "1", "--quiet"]
    shutil.copy(text_file, tmp_path / "replay.jsonl")
    interrupt_after(monkeypatch, 1)
    assert main(words) == 130
    kept = file.read_bytes()
    again = [*record, str(text_file), "--estimator", "fisher", "--documents", "9", "--overwrite"]
    assert main(again) == 0
    assert main([*words, "--resume"]) == 1
    assert "changed are the importance file" in capsys.readouterr().err
    file.write_bytes(kept)
    (tmp_path / "replay.jsonl").write_text(json.dumps({"text": "the cat"}))
    assert main([*words, "--resume"]) == 1
    assert "changed are the replayed text" in capsys.readouterr().err
    shutil.copy(text_file, tmp_path / "replay.jsonl")
    folder = shutil.copytree(model_folder, tmp_path / "kept")
    weights = load_file(model_folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"  # a fine-tune that left the embedding alone
    weights[name] = weights[name] + 0.1
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert main([*words, "--resume"]) == 1
    assert "changed are the base model" in capsys.readouterr().err
    shutil.rmtree(model_folder)
    shutil.copytree(folder, model_folder)
    assert main([*words, "--resume"]) == 0


def test_a_comparison_records_anew_where_the_base_was_replaced(
    model_folder, text_file, tmp_path, monkeypatch
):
    """Its addresses hash what the base is, not its name alone."""
    from forgetless.compare import recipes
    from forgetless.compare.compare import with_base

    given = {
        "model": str(model_folder),
        "general": {"one": str(text_file), "two": str(text_file)},
        "domains": {"d": {"data": str(text_file)}},
        "importance": {"i": {"estimator": "uniform"}},
        "methods": {"plain": {"grid": {"learning_rate": [1e-3]}}},
    }
    experiment = experiment_of(given, "e.yaml")
    files = {"general/one/record": str(text_file)}
    recorded = []
    original = recipes.record
    monkeypatch.setattr(recipes, "record", lambda o: recorded.append(o.out) or original(o))
    for _ in range(2):
        record_all(with_base(experiment), files, tmp_path)
    assert len(recorded) == 1
    replaced(model_folder)
    record_all(with_base(experiment), files, tmp_path)
    assert len(set(recorded)) == 2
