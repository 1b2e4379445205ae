"""Options of tune, each by what it changes: chats, truncation, packing, evaluation during training,
dtype, checkpointing, targets of full fine-tuning.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import PLAIN, unheld
from forgetless.errors import OptionError
from forgetless.model import precision
from forgetless.model.loading import load_model
from forgetless.model.precision import check_trains_in, load_to_train
from forgetless.options.model import ModelOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record.record import record
from forgetless.tune.tune import tune

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": f"sat {end}"},
        ]
    }
    for end in ("on", "too", "mat", "then")
]


@pytest.fixture
def tuned(model_folder, tmp_path):
    """A function: rows, options -> (run, tensors of the result)."""
    count = 0

    def run(rows, **given):
        nonlocal count
        count += 1
        data, out = tmp_path / f"d{count}.jsonl", tmp_path / f"run{count}"
        data.write_text("\n".join(json.dumps(row) for row in rows))
        options = {
            "model": str(model_folder),
            "data": str(data),
            "out": str(out),
            "rank": 2,
            "batch_size": 2,
            "accumulation": 1,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "log_steps": 1,
            "device": "cpu",
            **given,
        }
        result = tune(resolve(TuneOptions, unheld(options)))
        return result, load_file(
            out
            / "final"
            / ("model.safetensors" if given.get("full") else "adapter_model.safetensors")
        )

    return run


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_chats_train_on_assistant_turns_with_any_template(tuned, tokenizer, model_folder, tmp_path):
    """Another user turn of the same length changes nothing in which tokens are scored; with
    completion_only off all are.
    """
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(model_folder)
    run, assistant = tuned(CHATS, eval_data=None)
    _, everything = tuned(CHATS, completion_only=False)
    assert not same(assistant, everything) and run["log"][0]["loss"] > 0
    tokens = lambda log: log["log"][0]["num_tokens"]
    assert tokens(run) == 2 * 10  # two rows of: user : the cat . assistant : sat on .


def test_cut_completions_are_said_and_rows_without_any_are_left_out(tuned, caplog):
    rows = [{"prompt": "the cat", "completion": " sat on"}] * 6 + [
        {"prompt": "the cat sat on the mat and then", "completion": " the dog"}
    ] * 2
    run, _ = tuned(rows, length=8)
    assert (
        "2 of 8 rows are longer than --length 8: 2 lose all that is scored and are left out"
        in caplog.text
    )
    assert (
        "--length 11 would keep 100% of the rows whole (the model takes at most 32 tokens)"
        in caplog.text
    )
    assert run["data"]["rows"] == 8 and run["data"]["rows_trained"] == 6
    caplog.clear()
    tuned(rows, length=11)
    assert "longer than" not in caplog.text


def test_packing_makes_fewer_longer_sequences(tuned):
    rows = [{"text": "the cat sat on"}] * 12
    (loose, _), (packed, _) = (
        tuned(rows, length=20, max_steps=1),
        tuned(rows, length=20, max_steps=1, packing=True),
    )
    assert packed["log"][0]["num_tokens"] > 2 * loose["log"][0]["num_tokens"]


def test_evaluation_during_training_before_and_after(tuned, tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"the cat {end}"}) for end in ("sat", "on", "too"))
    )
    run, _ = tuned([{"text": "the cat sat on"}] * 8, eval_data=str(path), eval_steps=1, max_steps=4)
    during = [entry["eval_loss"] for entry in run["log"] if "eval_loss" in entry]
    assert len(during) == 4 and during[-1] < during[0]
    assert run["learning"]["nats"] > 0 and run["before"]["domain"]["documents"] == 3


def test_dtype_checkpointing_and_rslora(tuned, tmp_path):
    rows = [{"text": "the cat sat on the mat"}] * 8
    _, plain = tuned(rows)
    _, recomputed = tuned(rows, gradient_checkpointing=True)
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)
    _, half = tuned(rows, dtype="bfloat16")
    assert not same(plain, half)
    _, stabilised = tuned(rows, rslora=True)
    assert (
        not same(plain, stabilised)
        and json.loads((tmp_path / "run4" / "final" / "adapter_config.json").read_text())[
            "use_rslora"
        ]
        is True
    )


def test_full_fine_tuning_of_some_targets_holds_those(tuned, model_folder, text_file, tmp_path):
    options = {
        "model": str(model_folder),
        "general": str(text_file),
        "out": str(tmp_path / "i.safetensors"),
        "targets": "q_proj",
    }
    record(resolve(RecordOptions, options))
    held = {"importance": str(tmp_path / "i.safetensors"), "strength": 10.0}
    run, after = tuned([{"text": "the cat sat on"}] * 8, full=True, targets="q_proj", **held)
    before = load_file(model_folder / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)
    }
    assert run["energy"] > 0


@pytest.mark.parametrize("stated", ["stated", "not stated"])
def test_a_float16_checkpoint_is_trained_in_another_dtype(
    model_folder, caplog, monkeypatch, stated
):
    """In float16 most gradients of a step of many tokens are nothing. What is only measured stays
    as it is stored.
    """
    path = model_folder / "config.json"
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float16).save_pretrained(
        model_folder
    )
    config = json.loads(path.read_text())
    assert config.pop("dtype") == "float16"
    if stated == "not stated":
        path.write_text(json.dumps(config))
    options = resolve(ModelOptions, {"model": str(model_folder), "device": "cpu"})
    with caplog.at_level(logging.INFO, "forgetless"):
        model = load_to_train(options)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "is stored in float16" in caplog.text and "loaded in float32" in caplog.text
    assert load_model(options).dtype == torch.float16
    asked = replace(options, dtype="float16")
    assert load_to_train(asked).dtype == torch.float16
    with pytest.raises(OptionError, match="without loss scaling"):
        check_trains_in(asked, full=False)
    monkeypatch.setattr(precision, "device_of", lambda _: torch.device("cuda"))
    check_trains_in(asked, full=False)
    with pytest.raises(OptionError, match="cannot be unscaled"):
        check_trains_in(asked, full=True)
