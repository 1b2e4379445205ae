"""Wrong input through the command line: exit code 1 or 2, a message that says what to do, no
traceback, and nothing is lost.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import unheld
from forgetless.cli import main
from forgetless.record import training as path_training
from forgetless.record.observing_recorder import ObservingRecorder


@pytest.fixture
def importance_file(model_folder, text_file, tmp_path):
    path = tmp_path / "i.safetensors"
    assert (
        main(
            [
                "record",
                str(model_folder),
                "--general",
                str(text_file),
                "--out",
                str(path),
                "--estimator",
                "fisher",
                "--quiet",
            ]
        )
        == 0
    )
    return path


@pytest.fixture
def fails(capsys):
    """A function: words, exit code, parts of the message -> the message; the traceback comes with
    --debug only.
    """

    def check(words, code, *parts):
        capsys.readouterr()
        if words[0] == "tune":
            words = unheld(words)
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert status == code, error
        assert all(part in error for part in parts), error
        assert "Traceback" not in error and "Error;" not in error, (
            error
        )  # foreseen: neither a traceback nor the name of an exception
        return error

    return check


def rewritten(path, target, change=lambda tensors: tensors, **metadata):
    """A copy of an importance file with other tensors or metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        info = json.loads(file.metadata()["forgetless"])
    info.update(metadata)
    save_file(change(load_file(path)), target, metadata={"forgetless": json.dumps(info)})
    return target


def test_importance_files(fails, importance_file, model_folder, text_file, tmp_path):
    tune = [
        "tune",
        model_folder,
        "--data",
        text_file,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--importance",
    ]
    whole, bad = importance_file.read_bytes(), tmp_path / "bad.safetensors"
    fails(
        [*tune, tmp_path / "none.safetensors"],
        1,
        "none.safetensors' does not exist",
        "forgetless record MODEL",
    )
    bad.write_bytes(whole[: len(whole) // 2])
    fails([*tune, bad], 1, "bad.safetensors is not a whole safetensors file")
    fails([*tune, model_folder / "model.safetensors"], 1, "a safetensors file of something else")
    fails([*tune, text_file], 1, "not a whole safetensors file")
    first = next(name for name in load_file(importance_file) if name.endswith("q_proj.weight"))
    poison = lambda tensors: {**tensors, first: torch.full_like(tensors[first], float("nan"))}
    fails(
        [*tune, rewritten(importance_file, bad, poison)], 1, f"'{first}' has non-finite importance"
    )
    shape = lambda tensors: (
        {name: t for name, t in tensors.items() if not name.startswith(first)}
        | {first: torch.ones(3, 3)}
    )
    fails(
        [*tune, rewritten(importance_file, bad, shape)],
        1,
        f"'{first}' is (3, 3) in the file and (16, 16) in the model",
        "record again",
    )
    fails(
        [
            *tune,
            rewritten(importance_file, bad, model={"name": "other/base", "fingerprint": "0" * 64}),
        ],
        1,
        "another base model",
        "other/base",
    )
    fails(["inspect", bad.with_name("none")], 1, "does not exist")
    fails(["inspect", text_file], 1, "not a whole safetensors file")
    assert importance_file.read_bytes() == whole and not (tmp_path / "run" / "final").exists()


def test_data(fails, model_folder, text_file, tmp_path):
    path = tmp_path / "d.jsonl"
    tune = ["tune", model_folder, "--out", tmp_path / "run", "--data"]
    record = ["record", model_folder, "--out", tmp_path / "i.safetensors", "--general"]
    for verb in (tune, record):
        path.write_text('{"text": "fine"}\n{"text": \n')
        fails([*verb, path], 1, "d.jsonl', line 2: not valid JSON")
        path.write_text("")
        fails([*verb, path], 1, "d.jsonl' is empty")
        path.write_text('{"body": "x", "id": 1}\n')
        fails([*verb, path], 1, "has the columns body, id; expected")
        fails([*verb, tmp_path / "none.csv"], 1, "none.csv' is not a file")
        fails([*verb, model_folder], 1, "is not a file; expected .txt, .jsonl")
        fails(
            [*verb, "nobody/no-such-data"],
            1,
            "neither a local file nor a dataset that can be loaded",
            "connection",
        )
        path.write_bytes(b'{"text": "\xff\xfe"}\n')
        fails([*verb, path], 1, "not UTF-8 text (byte 10)")
        path.write_text('{"messages": [{"role": "user", "content": "the cat"}]}\n')
        fails([*verb, path], 1, "the tokenizer has no chat template")
    path.write_text(json.dumps({"prompt": "the cat sat on the mat", "completion": " yes"}) + "\n")
    fails(
        [*tune, path, "--length", "5"],
        1,
        "within --length 5 no row keeps a token to score",
        "--length 8 would keep 100%",
    )


def test_names(fails, importance_file, model_folder, text_file, tmp_path):
    tune = [
        "tune",
        model_folder,
        "--data",
        text_file,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        "--importance",
        importance_file,
    ]
    fails(
        [*tune, "--targets", "q_prj"],
        2,
        "no linear layer of the model is called 'q_prj'; did you mean 'q_proj'?",
    )
    fails([*tune, "--targets", "(["], 2, "not a regular expression")
    fails([*tune, "--layers", "unifrm"], 2, "unknown layers 'unifrm'; did you mean 'uniform'?")
    (tmp_path / "c.yaml").write_text("layers:\n  q_prj: 2\n")
    fails(
        [*tune, "--config", tmp_path / "c.yaml"],
        2,
        "no target weight of kind 'q_prj'; did you mean 'q_proj'?",
    )
    (tmp_path / "c.yaml").write_text("stength: 2\n")
    fails(
        [*tune, "--config", tmp_path / "c.yaml"],
        2,
        "unknown option 'stength'",
        "did you mean 'strength'?",
    )
    fails([*tune, "--config", tmp_path / "no.yaml"], 1, "no.yaml' does not exist")
    fails([*tune, "--tasks", "sciqq"], 2, "unknown task 'sciqq'; did you mean 'sciq'?")
    fails([*tune, "--data", "scqi=x.jsonl"], 2, "unknown task 'scqi'; did you mean 'sciq'?")
    fails([*tune, "--device", "gpu"], 2, "--device gpu is not to be had here")
    fails([*tune, "--strenth", "1"], 2, "unknown option '--strenth'; did you mean '--strength'?")
    fails([*tune, "--dtype", "bf16"], 2, "--dtype expects one of")
    fails([*tune, "--report-to", "tensorbord"], 2, "did you mean 'tensorboard'?")
    fails([*tune, "--rank", "0"], 2, "--rank must be")
    fails([*tune, "--batch-size", "-1"], 2, "--batch-size must be")
    fails([*tune, "--strength", "-1"], 2, "--strength must")
    fails([*tune, "--dropout", "1.5"], 2, "--dropout must")
    fails(["tunee", model_folder], 2, "unknown verb 'tunee'; did you mean 'tune'?")
    fails(
        ["eval", model_folder, "--general", text_file, "--adapter", "a", "--tuned", "b"],
        2,
        "not both",
    )
    fails(["merge", tmp_path, "--out", tmp_path / "m"], 1, "is not an adapter folder")


def test_models(fails, model_folder, text_file, tmp_path):
    given = ["--general", text_file, "--out", tmp_path / "i.safetensors"]
    fails(["record", "./no-model", *given], 1, "model './no-model' does not exist")
    fails(["record", tmp_path, *given], 1, "is not a model folder: expected config.json")
    fails(
        ["record", "nobody/no-such-model", *given],
        1,
        "cannot load 'nobody/no-such-model' (offline mode is on",
        "local folder",
    )
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fails(["record", model_folder, *given], 1, "cannot load", "model")
    (model_folder / "config.json").write_text("{")
    fails(["record", model_folder, *given], 1, "cannot load", "config.json")


def test_a_base_is_bare_whole_and_no_pickle(fails, model_folder, text_file, tmp_path, tiny):
    """With an adapter beside it, the adapter was loaded, measured as forgetting and thrown away; a
    base that lacked tensors ran with random ones; a pickle was opened.
    """
    from peft import LoraConfig, get_peft_model

    evaluate = ["eval", model_folder, "--general", text_file]
    weights = model_folder / "model.safetensors"
    tensors = load_file(weights)
    lost = "model.layers.1.self_attn.q_proj.weight"
    torch.save(tensors, model_folder / "pytorch_model.bin")
    rest = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(rest, weights, metadata={"format": "pt"})
    fails(evaluate, 1, "lacks 1 of the model's tensors", lost, "random")
    weights.unlink()
    fails(evaluate, 1, "Pickles (pytorch_model.bin) are not opened", "save_pretrained")
    save_file(tensors, weights, metadata={"format": "pt"})
    adapted = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(model_folder)
    i = tmp_path / "i.safetensors"
    for words in (
        evaluate,
        ["tune", model_folder, "--data", text_file, "--out", tmp_path / "run"],
        ["record", model_folder, "--general", text_file, "--out", i],
        ["eval", tmp_path / "bare", "--tuned", model_folder, "--general", text_file],
    ):
        if not (tmp_path / "bare").exists():
            tiny().save_pretrained(tmp_path / "bare")
            for file in model_folder.glob("tokenizer*"):
                shutil.copy(file, tmp_path / "bare")
        fails(words, 1, "holds both a model (config.json) and an adapter")
    assert not i.exists()


def test_places(fails, importance_file, model_folder, text_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below"
    fails(
        ["record", model_folder, "--general", text_file, "--out", below / "i.safetensors"],
        1,
        "cannot write into",
        "--out",
    )
    fails(
        ["record", model_folder, "--general", text_file, "--out", tmp_path],
        1,
        "is a folder, expected the name of a file",
    )
    fails(
        ["tune", model_folder, "--data", text_file, "--out", below], 1, "cannot write into", "--out"
    )
    fails(
        ["eval", model_folder, "--general", text_file, "--out", below],
        1,
        "cannot write into",
        "--out",
    )
    trained = []
    monkeypatch.setattr(path_training, "train", lambda *a: trained.append(a))
    monkeypatch.setattr(ObservingRecorder, "observe", lambda *a, **k: trained.append(a))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for extra in (
        ["--estimator", "path"],
        ["--estimator", "path", "--tier", "bf16"],
        [],
        ["--estimator", "fisher"],
        ["--cov-rank", "0"],
    ):
        fails(
            [
                "record",
                model_folder,
                "--general",
                text_file,
                "--out",
                tmp_path / "j.safetensors",
                *extra,
            ],
            1,
            "MiB free",
            "make room",
        )
    fails(
        ["tune", model_folder, "--data", text_file, "--out", tmp_path / "run", "--device", "cpu"],
        1,
        "MiB free",
        "make room",
    )
    assert not trained and not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("verb", ["record", "tune"])
def test_a_non_finite_loss_names_the_step_and_keeps_what_was_saved(
    fails, model_folder, text_file, tmp_path, verb
):
    out = tmp_path / "out"
    given = [
        "--out",
        out,
        "--learning-rate",
        "1e30",
        "--batch-size",
        "2",
        "--accumulation",
        "1",
        "--save-steps",
        "1",
        "--rank",
        "2",
        "--device",
        "cpu",
    ]
    words = (
        ["record", model_folder, "--general", text_file, "--estimator", "path", *given]
        if verb == "record"
        else ["tune", model_folder, "--data", text_file, *given]
    )
    fails(words, 1, "step 2", "earning", "kept")
    if verb == "record":
        assert torch.load(f"{out}.state", weights_only=True)["done"] == 1 and not out.exists()
        (tmp_path / "out.state").write_bytes(b"half")
        fails([*words, "--resume"], 1, "is not a whole saved state", "--resume")
    else:
        kept = load_file(
            next((out / "checkpoints").glob("checkpoint-*")) / "adapter_model.safetensors"
        )
        assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


def test_debug_shows_the_traceback(capsys):
    assert main(["--debug", "inspect", "none.safetensors"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_that_is_not_what_is_expected_ends_with_1_for_every_verb(
    fails, model_folder, text_file, tmp_path
):
    """`chat` and --earlier gave 2, as if an option were misspelt."""
    none = tmp_path / "none"
    fails(["chat", none, "--prompt", "Hello"], 1, "is not a run (expected run.json and final/")
    fails(["merge", none, "--out", tmp_path / "m"], 1, "is not an adapter folder")
    shrink = ["shrink", none, "--importance", none, "--mu", "1", "--out", tmp_path / "s"]
    fails(shrink, 1, "none")
    fails(["inspect", none], 1, "none")
    fails(["report", none], 1, "does not exist")
    fails(["compare", none, "--out", tmp_path / "c"], 1, "none")
    fails(["eval", model_folder, "--general", text_file, "--adapter", none], 1, "none")
    fails(["check", model_folder, none, "--budget", "1%", "--general", text_file], 1, "none")
    tune = ["tune", model_folder, "--data", text_file, "--out", tmp_path / "run", "--general"]
    o_lora = ["--method", "o-lora", "--earlier", none]
    fails([*tune, "none", *o_lora], 1, "is not an adapter folder")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_finished_recording_is_replaced_when_that_is_asked_for(
    fails, model_folder, text_file, tmp_path
):
    out = tmp_path / "i.safetensors"
    words = ["record", model_folder, "--general", text_file, "--documents", "4", "--out", out]
    assert main([str(word) for word in words]) == 0
    first = out.read_bytes()
    for more in ([], ["--resume"]):
        fails([*words, *more], 1, "holds a finished recording; give another --out, or --overwrite")
    assert out.read_bytes() == first
    assert main([str(word) for word in [*words, "--overwrite"]]) == 0


def test_a_refused_budget_leaves_nothing_in_the_way(fails, model_folder, text_file, tmp_path):
    """The corrected command was refused, since the folder held a run that had begun."""
    words = ["tune", model_folder, "--data", text_file, "--out", tmp_path / "run", "--max-steps"]
    words += ["2", "--batch-size", "2", "--length", "32", "--device", "cpu", "--method", "plain"]
    short = [*words, "--budget", "1%", "--general", text_file]
    fails(short, 1, "is too short to show a budget of 1%")
    fails([*words, "--budget", "much"], 2, "--budget expects a rise")
    assert main([str(word) for word in [*words, "--general", "none"]]) == 0


def test_a_rate_at_which_the_loss_explodes_does_not_end_well(model_folder, text_file, tmp_path):
    words = ["tune", str(model_folder), "--data", str(text_file), "--out", str(tmp_path / "run")]
    words += [
        "--method",
        "plain",
        "--general",
        "none",
        "--learning-rate",
        "50",
        "--max-steps",
        "30",
    ]
    words += ["--batch-size", "2", "--length", "32", "--device", "cpu", "--log-steps", "5"]
    assert main(words) == 1
