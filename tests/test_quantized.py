"""4- and 8-bit bases as bitsandbytes and PEFT wrap them: only the factors are read, so names,
shapes and importance are those of the bare model.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from conftest import SMALL
from forgetless.errors import OptionError
from forgetless.evaluate.evaluate import evaluate
from forgetless.importance.controls import uniform
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.fingerprint import fingerprint
from forgetless.model.linear import base_shapes, linear_layers
from forgetless.model.loading import load_model
from forgetless.model.targets import target_weights
from forgetless.options.finished import EvalOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.penalty.pull import Penalty
from forgetless.record.kronecker import Kronecker
from forgetless.record.path import PathIntegral
from forgetless.record.record import record
from forgetless.tune.merge import merge
from forgetless.tune.tune import tune

pytest.importorskip("bitsandbytes", reason="--quantize needs bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
BITS = pytest.mark.parametrize("bits", ["4bit", "8bit"])


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A tiny Llama wide enough for blocks of 64, on disk."""
    torch.manual_seed(0)
    path = tmp_path / "model"
    AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128})
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def loaded(folder, bits="none"):
    return load_model(resolve(TuneOptions, {"model": folder, "quantize": bits, "device": "cpu"}))


@BITS
def test_names_shapes_and_fingerprint_are_those_of_the_bare_model(folder, bits):
    bare, quantised = loaded(folder), loaded(folder, bits)
    assert "Linear4bit" in str(quantised) or "Linear8bitLt" in str(quantised)
    assert [path for path, _ in linear_layers(quantised)] == [
        path for path, _ in linear_layers(bare)
    ]
    assert base_shapes(quantised) == base_shapes(bare) and fingerprint(quantised) == fingerprint(
        bare
    )
    adapted = add_adapter(quantised, names="all-linear", rank=2, alpha=4)
    assert {w.name: w.shape for w in target_weights(adapted)} == {
        name: shape for name, shape in base_shapes(bare).items() if name != "lm_head.weight"
    }
    assert base_shapes(adapted) == base_shapes(bare) and fingerprint(adapted) == fingerprint(bare)


@BITS
def test_the_exact_gradient_is_that_of_the_dequantised_weight(folder, bits, batch):
    """Against the chain rule on the factors: gB = s G A^T and gA = s B^T G for G = dL/dU."""
    model = add_adapter(loaded(folder, bits), names="q_proj,down_proj", rank=2, alpha=4)
    recorder, seen = PathIntegral(model), {}
    for weight in recorder.weights:
        torch.nn.init.normal_(weight.B, std=0.1)
    recorder.record_step = lambda before, gradients: seen.update(gradients)
    optimizer = torch.optim.SGD([p for w in recorder.weights for p in w.parameters], lr=1e-3)
    with recorder.attach(optimizer):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    for weight in recorder.weights:
        G, (A, B) = seen[weight.name], (weight.A.detach(), weight.B.detach())
        torch.testing.assert_close(
            weight.scale * G @ A.T,
            weight.B.grad,
            rtol=0.02,
            atol=0.02 * float(weight.B.grad.abs().max()),
        )
        assert A.shape[1] == G.shape[1] and B.shape[0] == G.shape[0]


@BITS
def test_record_tune_eval_and_merge(folder, bits, text_file, tmp_path):
    common = {
        "model": folder,
        "quantize": bits,
        "device": "cpu",
        "rank": 2,
        "batch_size": 4,
        "accumulation": 1,
        "max_steps": 3,
    }
    record(
        resolve(
            RecordOptions,
            {
                **common,
                "general": str(text_file),
                "out": str(tmp_path / "i.safetensors"),
                "estimator": "path",
            },
        )
    )
    importance = Importance.load(tmp_path / "i.safetensors")
    assert (
        importance.info["settings"]["quantize"] == bits
        and importance.info["settings"]["decrease_nats"] != 0
    )
    given = {
        **common,
        "data": str(text_file),
        "importance": str(tmp_path / "i.safetensors"),
        "log_steps": 1,
    }
    run = tune(resolve(TuneOptions, {**given, "out": str(tmp_path / "run")}))
    assert run["energy"] > 0
    final = str(tmp_path / "run" / "final")
    seen = evaluate(
        resolve(
            EvalOptions,
            {"model": folder, "adapter": final, "general": str(text_file), "device": "cpu"},
        )
    )  # the same adapter, on the bare base
    assert seen["forgetting"]["nats"] != 0
    merge(final, str(tmp_path / "merged"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


def test_full_fine_tuning_of_a_quantised_base_is_refused(folder, text_file, tmp_path):
    given = {
        "model": folder,
        "quantize": "4bit",
        "full": True,
        "data": str(text_file),
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(OptionError, match="leave out --quantize"):
        tune(resolve(TuneOptions, given))
    with pytest.raises(
        ValueError, match="neither a LoRA layer nor a linear layer that requires a gradient"
    ):
        target_weights(loaded(folder, "4bit"))


@pytest.fixture
def packing_cpu(monkeypatch):
    """bitsandbytes as on a CPU with AVX512-BF16, which packs 4-bit weights when they are evaluated;
    what is packed is multiplied by the same sums, without a backward pass.
    """
    import bitsandbytes.functional as functional
    import bitsandbytes.nn.modules as modules

    def multiplied(A, B, out=None, state=None):
        state = copy.deepcopy(state)
        with torch.no_grad():
            codes, state = functional._convert_weight_packed_for_cpu_inverse(B.clone(), state)
            return A @ functional.dequantize_4bit(codes, state).to(A.dtype).T

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(functional, "gemv_4bit", multiplied)


def factor_gradients(model, batch):
    model.train()
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    return {weight.name: weight.B.grad.clone() for weight in target_weights(model)}


def test_an_evaluation_leaves_the_gradients_of_a_4_bit_model(packing_cpu, folder, batch):
    torch.manual_seed(0)
    model = add_adapter(loaded(folder, "4bit"), names="all-linear", rank=2, alpha=4)
    before = factor_gradients(model, batch)
    with torch.no_grad():
        model.eval()(input_ids=batch)
    after = factor_gradients(model, batch)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_4_bit_models_of_others_are_kept_from_packing_or_refused(packing_cpu, folder, batch):
    """A trainer's own model, evaluated after or before it is held."""

    def theirs():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        return add_adapter(model, names="q_proj,v_proj", rank=2, alpha=4)

    model = theirs()
    importance = uniform(model.get_base_model(), "all-linear")
    before = factor_gradients(model, batch)
    Penalty(model, importance, strength=1.0)
    with torch.no_grad():
        model.eval()(input_ids=batch)
    after = factor_gradients(model, batch)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model = theirs()
    with torch.no_grad():
        model.eval()(input_ids=batch)
    with pytest.raises(ValueError, match="packed for inference"):
        Penalty(model, importance, strength=1.0)
    with pytest.raises(ValueError, match="packed for inference"):
        Kronecker(model)


def test_recording_in_4_bit_sees_what_the_dequantised_model_does(packing_cpu, folder, batch):
    model = loaded(folder, "4bit")
    recorder = Kronecker(model)
    recorder.observe(batch)
    importance = recorder.finish()
    assert all(importance[name].norm() > 0 for name in importance)
