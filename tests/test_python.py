"""The verbs from Python, and the names of the package."""

import subprocess
import sys

import pytest
import torch

import forgetless
from forgetless.errors import OptionError
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.record import RecordOptions
from forgetless.options.verbs import resolve


def same(one, other):
    return set(one) == set(other) and all(
        torch.equal(one[name].dense(), other[name].dense()) for name in one
    )


def test_the_names_are_listed_and_torch_is_not_imported():
    code = (
        "import sys, forgetless; forgetless.record; forgetless.tune; "
        "assert 'torch' not in sys.modules; print(*dir(forgetless))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {*forgetless.__all__, "__version__"}
    assert all(getattr(forgetless, name) is not None for name in forgetless.__all__)
    assert callable(forgetless.record) and callable(forgetless.tune) and forgetless.record.kronecker


def test_record_does_what_the_verb_does(model_folder, text_file, tmp_path):
    by_name = forgetless.record(
        model_folder, text=text_file, out=tmp_path / "a.safetensors", cov_rank=4, length=32
    )
    assert same(by_name, Importance.load(tmp_path / "a.safetensors"))
    options = resolve(RecordOptions, {"model": str(model_folder)})
    model, tokenizer = load_model(options), load_tokenizer(options)
    model = add_adapter(model, names="q_proj", rank=2, alpha=4)
    torch.nn.init.ones_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    model.train()
    loaded = forgetless.record(model, tokenizer, text=text_file, cov_rank=4, length=32)
    assert same(by_name, loaded) and "path" not in loaded.info and model.training
    assert loaded.info["model"] == by_name.info["model"]
    documents = ["the cat sat on the mat", {"text": "a dog and a cat"}]
    given = forgetless.record(model, tokenizer, text=documents, out=tmp_path / "b.safetensors")
    assert given.info["data"]["documents"] == 2
    assert "2-documents" in Importance.load(tmp_path / "b.safetensors").info["data"]["source"]


def test_record_refuses_what_a_loaded_model_cannot_have(tiny, tokenizer, text_file):
    for given, message in (
        ({"tokenizer": None}, "without one"),
        ({"estimator": "path"}, "trains an adapter of its own"),
        ({"text": []}, "an empty list"),
        ({"model": "gpt2"}, "whose tokenizer is loaded with it"),
        ({"rank": 4, "cov_ranc": 3}, "did you mean 'cov_rank'"),
    ):
        given = {"model": tiny(), "tokenizer": tokenizer, "text": text_file, **given}
        with pytest.raises(OptionError, match=message):
            forgetless.record(given.pop("model"), given.pop("tokenizer"), **given)


def test_tune_and_check_do_what_the_verbs_do(model_folder, text_file, tmp_path):
    run = forgetless.tune(
        model_folder,
        data=text_file,
        out=tmp_path / "run",
        method="plain",
        general=text_file,
        max_steps=1,
        rank=2,
    )
    assert run["forgetting"]["nats"] is not None and (tmp_path / "run" / "run.json").is_file()
    checked = forgetless.check(
        str(model_folder), str(tmp_path / "run"), budget="50%", general=str(text_file)
    )
    assert checked.gate.verdict in ("met", "not shown", "exceeded")
    with pytest.raises(OptionError, match=r"forgetless\.hold\(trainer"):
        forgetless.tune(torch.nn.Linear(1, 1), data=text_file, out=tmp_path / "other")
