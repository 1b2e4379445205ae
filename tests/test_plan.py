"""The plan: sizes of files that are then really recorded, sharing of inputs as a recorder finds it,
operations as torch counts them.
"""

import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from forgetless.cli import main
from forgetless.data.traces import planned_characters, traces_of
from forgetless.importance.importance import convert
from forgetless.importance.sizes import (
    Planned,
    bytes_of_file,
    bytes_of_tensors,
    pull_operations,
    shares,
    tensors_of,
)
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import base_layers
from forgetless.options.plan import PlanOptions
from forgetless.plan import fits
from forgetless.plan.plan import plan
from forgetless.plan.sketch import kept_per_token, shared_inputs, sketched
from forgetless.plan.time import operations, random_entry
from forgetless.record.kronecker import Kronecker

KINDS = ("llama", "mistral", "qwen", "gemma", "phi3", "gpt2", "gptj")


def planned(capsys, *words):
    assert main(["plan", *map(str, words), "--json", "--flops", "1e10"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def small(tokenizer, tmp_path):
    """A Llama large enough that its files are numbers rather than names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("estimator", ["kronecker", "fisher", "path", "activation"])
def test_files_are_as_large_as_planned(estimator, small, text_file, tmp_path, capsys):
    given = ["--cov-rank", "24"] if estimator == "kronecker" else []
    # The text has 300 words, each of them a token of the test's tokenizer.
    text = ["--general-tokens", len(text_file.read_text().split()) - 24]
    sizes = planned(capsys, small, "--estimator", estimator, *text, *given)["files"]
    file = tmp_path / "i.safetensors"
    assert (
        main(
            [
                "record",
                str(small),
                "--general",
                str(text_file),
                "--estimator",
                estimator,
                "--out",
                str(file),
                "--quiet",
                *given,
            ]
        )
        == 0
    )
    found = {next(iter(sizes)): file}
    for tier in list(sizes)[1:]:
        if tier in ("kronecker", "kronecker:64"):
            continue  # more than was recorded
        found[tier] = tmp_path / f"{tier.replace(':', '-')}.safetensors"
        convert(file, tier, found[tier])
    for tier, path in found.items():
        assert sizes[tier] == pytest.approx(
            path.stat().st_size, rel=0.01, abs=600 if sizes[tier] < 60_000 else 0
        ), tier
    if estimator == "kronecker":
        whole = tmp_path / "whole.safetensors"
        assert (
            main(
                [
                    "record",
                    str(small),
                    "--general",
                    str(text_file),
                    "--cov-rank",
                    "0",
                    "--out",
                    str(whole),
                    "--quiet",
                ]
            )
            == 0
        )
        assert sizes["kronecker"] == pytest.approx(whole.stat().st_size, rel=0.01)


@pytest.mark.parametrize("documents", [30, 400])
def test_hashes_of_a_text_are_as_long_as_planned(documents):
    """Of documents as long as planned; of the larger text not every run of words is kept."""
    texts = [" ".join(f"{document}x{word}" for word in range(192)) for document in range(documents)]
    found = {name: len(text) for name, text in traces_of(texts).plain().items()}
    assert planned_characters(256 * documents) == pytest.approx(found, rel=0.001)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_inputs_are_found_without_weights(kind, tiny, batch):
    """On the meta device as by a real forward pass, for every architecture."""
    model = tiny(kind)
    recorder = Kronecker(model, "all-linear")
    recorder.look(batch[:1])
    empty = model.to("meta")
    assert shared_inputs(empty, base_layers(empty, "all-linear"), 7) == recorder.leaders


def test_what_autograd_keeps_is_linear_in_tokens_and_as_on_the_cpu(tiny):
    model = add_adapter(tiny(), names="all-linear", rank=2, alpha=4)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(4, 31, dtype=torch.long)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    real = sum(storage.nbytes() for key, storage in kept.items() if key not in own) / ids.numel()
    assert kept_per_token(model.to("meta"), 13) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("full", [False, True])
def test_a_steps_operations_are_those_that_torch_counts(full, small):
    from transformers import AutoModelForCausalLM

    options = PlanOptions(model=str(small), full=full, tokens=4 * 63, length=63, accumulation=1)
    model = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager")
    if full:
        model.requires_grad_(False)
        for layer in base_layers(model, "all-linear"):
            layer.module.weight.requires_grad_(True)
    else:
        model = add_adapter(model, names="all-linear", rank=8, alpha=32)
    ids = torch.zeros(4, 63, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids).loss.backward()
    sketch = sketched(options)
    attention = (
        2 * 2.0 * 63 * sketch.width * sketch.blocks * ids.numel()
    )  # eager attention also does the half above the diagonal
    assert operations(options, sketch, "kronecker:16").step + attention == pytest.approx(
        counted.get_total_flops(), rel=0.06
    )


@pytest.mark.parametrize("tier", ["f32", "factored", "kronecker", "kronecker:8"])
def test_a_pulls_operations_are_those_that_torch_counts(tier):
    """Products only: torch counts nothing else."""
    from forgetless.penalty import dense
    from forgetless.penalty.algebra import low_rank_pull

    weight, r = Planned("w", (96, 160), "w"), 4
    A, B = torch.randn(r, 160), torch.randn(96, r)
    entry = random_entry(weight, tier, torch.device("cpu"))
    with FlopCounterMode(display=False) as counted:
        if tier == "f32":  # the twin: torch does not count products into a given tensor
            dense.pull(A, B, 1.0, entry.values, None, 1.0)
        else:
            low_rank_pull(A, B, 1.0, entry, B, A, 1.0)
    assert pull_operations(weight, tier, rank=r, full=False) == pytest.approx(
        counted.get_total_flops(), rel=0.1
    )


def test_memory_falls_with_processes_and_rank(small, capsys):
    one, four = planned(capsys, small), planned(capsys, small, "--processes", 4)
    held = [found["memory"]["tuning"]["importance"] for found in (one, four)]
    assert held[0] / 4 <= held[1] < 0.45 * held[0]
    assert four["memory"]["tuning"]["model"] == one["memory"]["tuning"]["model"]
    assert (
        planned(capsys, small, "--processes", 4, "--engine", "fsdp")["memory"]["tuning"]["model"]
        == one["memory"]["tuning"]["model"] / 4
    )
    assert (
        planned(capsys, small, "--rank", 16)["trained_parameters"] == 2 * one["trained_parameters"]
    )
    lean = planned(capsys, small, "--gradient-checkpointing")
    assert (
        lean["memory"]["tuning"]["activations"] < one["memory"]["tuning"]["activations"]
        and lean["operations"]["step"] > one["operations"]["step"]
    )
    assert (
        planned(capsys, small, "--quantize", "4bit")["memory"]["tuning"]["model"]
        < 0.5 * one["memory"]["tuning"]["model"]
    )


def test_shares_keep_shared_inputs_together_and_lose_nothing():
    weights = [Planned(f"{i}.{kind}", (64, 32), f"{i}.q") for i in range(5) for kind in "qkv"]
    parts = shares(weights, "kronecker:8", 3)
    assert sorted(w.name for part in parts for w in part) == sorted(w.name for w in weights)
    assert all(len({w.leader for w in part}) * 3 == len(part) for part in parts)
    assert sum(bytes_of_tensors(part, "kronecker:8") for part in parts) == bytes_of_tensors(
        weights, "kronecker:8"
    )


def test_numbers_of_every_tier():
    weight = Planned("w", (6, 130), "w")
    count = lambda tier: {
        suffix: math.prod(shape) for suffix, (shape, _) in tensors_of(weight, tier).items()
    }
    assert count("u4") == {".codes": 6 * 65, ".scale": 12} and count("u8") == {
        ".codes": 780,
        ".scale": 12,
    }
    assert count("kronecker:8") == {
        ".out_cov.vectors": 36,
        ".out_cov.values": 6,
        ".out_cov.floor": 1,
        ".in_cov.vectors": 1040,
        ".in_cov.values": 8,
        ".in_cov.floor": 1,
    }
    assert bytes_of_file([weight], "f32", estimator="fisher") > 4 * 780


def test_only_the_configuration_is_read(small, capsys):
    (small / "model.safetensors").unlink()
    assert main(["plan", str(small)]) == 0  # with rates measured here
    out = capsys.readouterr().out
    assert "<- tuned with" in out and "measured on" in out and "% of the step" in out
    assert main(["plan", str(small), "--tier", "kronecker:4", "--estimator", "fisher"]) == 2
    assert main(["plan", "./nothing"]) == 1


def test_plan_from_python_returns_what_it_prints(small, capsys):
    found = plan(PlanOptions(model=str(small), flops=1e12, json=True))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_what_fits_on_usual_gpus_and_in_how_many_passes(small, capsys, monkeypatch):
    """A model of 4 GiB whose sums take 40: record divides them where one pass does not fit."""
    options = PlanOptions(model=str(small))
    weights = [
        Planned(f"model.layers.{i}.mlp.up_proj.weight", (4, 4), f"model.layers.{i}.mlp.up_proj.w")
        for i in range(40)
    ]
    sketch = dataclasses.replace(sketched(options), weights=weights)
    monkeypatch.setattr(fits, "sums_of", lambda _, some: len(some) * 2**30)
    recording = {"model": 4 * 2**30, "sums": 40 * 2**30, "activations": 2 * 2**30}
    found = fits.fitting_on(options, sketch, recording, {"together": 30 * 2**30})
    assert [each.tuning for each in found] == [False, True, True]
    # On 24 GB 18.08 are free, of which half is for sums: 9 weights at a time.
    assert [each.recording_passes for each in found] == [5, 2, 2]
    path = dataclasses.replace(options, estimator="path")
    assert [each.recording_passes for each in fits.fitting_on(path, sketch, recording, {})] == [
        None,
        None,
        1,
    ]
    assert main(["plan", str(small), "--flops", "1e10"]) == 0
    shown = capsys.readouterr()
    assert "fits on a GPU of" in shown.out and "in one pass" in shown.out
    assert "next: forgetless record" in shown.err
