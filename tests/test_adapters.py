"""The adapters that PEFT makes: each is run, run with a limit, or refused with the alternative, as
docs/adapters.md has it.
"""

import copy
import json
import logging

import pytest
import torch
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, MixtralConfig

from conftest import SMALL, move_adapter, tiny_model
from forgetless.evaluate.evaluate import evaluate
from forgetless.importance.controls import uniform
from forgetless.model.adapter_files import checked_adapter, with_adapter
from forgetless.model.adapter_path import AdapterPath, scaled_update
from forgetless.model.adapters import bare
from forgetless.model.fingerprint import exact_fingerprint, fingerprint
from forgetless.model.linear import base_shapes
from forgetless.model.merging import merged_adapter
from forgetless.model.update import Update
from forgetless.options.finished import EvalOptions
from forgetless.options.verbs import resolve
from forgetless.penalty.pull import Penalty

IDS = torch.arange(3, 30)[None]
LORA = dict(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
OTHER = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
# What a user's training can leave: name -> (configuration of PEFT, base, how it is scaled).
# "factors": by LoRA's layers; "path": along its parameters; "no": refused.
TABLE = {
    "LoRA": (LoraConfig(**LORA), "llama", "factors"),
    "lora_bias": (
        LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        "qwen",
        "factors",
    ),
    "rsLoRA": (LoraConfig(**LORA, use_rslora=True), "llama", "factors"),
    "rank_pattern, alpha_pattern": (
        LoraConfig(**LORA, rank_pattern={"q_proj": 1}, alpha_pattern={"down_proj": 3}),
        "llama",
        "factors",
    ),
    "layers_to_transform": (LoraConfig(**LORA, layers_to_transform=[1]), "llama", "factors"),
    "LoRA on embeddings": (
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
        "llama",
        "factors",
    ),
    "target_parameters": (
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
        "mixtral",
        "factors",
    ),
    "DoRA": (LoraConfig(**LORA, use_dora=True), "llama", "path"),
    "DoRA on Conv1D": (
        LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
        "gpt2",
        "path",
    ),
    "modules_to_save": (LoraConfig(**LORA, modules_to_save=["lm_head", "norm"]), "llama", "path"),
    "trainable_token_indices": (
        LoraConfig(**LORA, trainable_token_indices=[4, 7]),
        "llama",
        "path",
    ),
    "biases": (LoraConfig(**LORA, bias="all"), "qwen", "path"),
    "PiSSA": (LoraConfig(**LORA, init_lora_weights="pissa"), "llama", "no"),
    "OLoRA": (LoraConfig(**LORA, init_lora_weights="olora"), "llama", "no"),
    "OFT": (OFTConfig(**OTHER, oft_block_size=4, r=0), "llama", "path"),
    "BOFT": (BOFTConfig(**OTHER, boft_block_size=4), "llama", "path"),
    "IA3": (
        IA3Config(**OTHER, feedforward_modules=[]),
        "llama",
        "path",
    ),
    "VeRA": (VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), "llama", "path"),
    "LoHa": (LoHaConfig(**OTHER, r=2), "llama", "path"),
    "LoKr": (LoKrConfig(**OTHER, r=2), "llama", "path"),
}


def model_of(kind):
    if kind != "mixtral":
        return tiny_model(kind)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)
    )


def said_by(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(config, kind, folder):
    """An adapter that was moved a little, saved to a folder; what base and adapter say."""
    torch.manual_seed(1)
    adapted = get_peft_model(model_of(kind), config)
    move_adapter(adapted)
    adapted.save_pretrained(folder)
    return said_by(adapted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_adapter_is_loaded_switched_off_scaled_and_merged(name, tmp_path):
    config, kind, how = TABLE[name]
    said = trained(config, kind, tmp_path / "adapter")
    base = said_by(model_of(kind))
    adapted = with_adapter(model_of(kind), tmp_path / "adapter")
    torch.testing.assert_close(said_by(adapted), said, atol=1e-5, rtol=1e-5)
    if how == "no":
        with pytest.raises(ValueError, match="starts away from the base"):
            scaled_update(adapted)
    else:
        with bare(adapted) as model:
            torch.testing.assert_close(said_by(model), base, atol=1e-5, rtol=1e-5)
        path = scaled_update(adapted)
        assert isinstance(path, AdapterPath) == (how == "path")
        path.scale(0)
        torch.testing.assert_close(said_by(adapted), base, atol=1e-5, rtol=1e-5)
        path.scale(0.5)
        halfway = said_by(adapted)
        assert (halfway - base).norm() < (said - base).norm() > (halfway - said).norm()
        path.scale(1)
    torch.testing.assert_close(said_by(adapted), said, atol=1e-5, rtol=1e-5)
    plain = merged_adapter(adapted)
    torch.testing.assert_close(said_by(plain), said, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_bias_that_the_base_has_no_place_for_is_not_merged(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(**LORA, lora_bias=True))
    with pytest.raises(ValueError, match="Use the adapter as it is"):
        merged_adapter(adapted)


def test_a_scale_of_nothing_is_the_base(model_folder, text_file, tmp_path):
    """Whole modules stayed at full size: at --scale 0 the table showed a change."""
    config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    trained(config, "llama", tmp_path / "adapter")
    given = dict(model=str(model_folder), adapter=str(tmp_path / "adapter"), device="cpu")
    for scale in (0, 1):
        run = evaluate(resolve(EvalOptions, {**given, "general": str(text_file), "scale": scale}))
        assert (abs(run["forgetting"]["nats"]) < 1e-6) == (scale == 0)


def unsloths(names=("q_proj", "v_proj")):
    """A pattern as Unsloth's get_peft_regex makes it."""
    kinds = "|".join(names)
    return (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        rf"(?:{kinds}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|attn|mlp)\."
        rf"(?:(?:{kinds})))"
    )


def test_patterns_as_unsloth_writes_them_are_taken(tmp_path):
    """Five repeats looked too many; matching them takes no time."""
    config = LoraConfig(r=2, target_modules=unsloths(), task_type="CAUSAL_LM")
    said = trained(config, "llama", tmp_path / "adapter")
    adapted = with_adapter(tiny_model(), tmp_path / "adapter")
    torch.testing.assert_close(said_by(adapted), said)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"loftq_config": {"loftq_bits": 4}},
        {"corda_config": {"cache_file": None, "corda_method": "kpm"}},
    ],
)
def test_what_only_started_an_adapter_does_not_matter(tmp_path, fields):
    said = trained(LoraConfig(**LORA), "llama", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    assert checked_adapter(tmp_path / "adapter")["peft_type"] == "LORA"
    adapted = with_adapter(tiny_model(), tmp_path / "adapter")
    torch.testing.assert_close(said_by(adapted), said)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_another_base_than_the_adapters_is_said(model_folder, text_file, tmp_path, caplog):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    base.config._name_or_path = base.name_or_path = "somebody/another-base"
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(tmp_path / "run" / "final")
    options = dict(model=str(model_folder), adapter=str(tmp_path / "run"), device="cpu")
    with caplog.at_level(logging.WARNING, "forgetless"):
        evaluate(resolve(EvalOptions, {**options, "general": str(text_file)}))
    assert "says that its base is 'somebody/another-base'" in caplog.text
    assert isinstance(with_adapter(tiny_model(), tmp_path / "run"), PeftModel)


WRAPPED = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "norm"]},
    {"trainable_token_indices": [5]},
]


@pytest.mark.parametrize("config", WRAPPED)
def test_wrappers_do_not_make_it_another_base(config):
    """PEFT's names entered the fingerprint: the importance was 'recorded on another base model'."""
    bare_model = tiny_model()
    importance = uniform(bare_model, "all-linear")
    marks = fingerprint(bare_model), exact_fingerprint(bare_model), base_shapes(bare_model)
    adapted = get_peft_model(tiny_model(), LoraConfig(**LORA, **config))
    assert (fingerprint(adapted), exact_fingerprint(adapted), base_shapes(adapted)) == marks
    Penalty(adapted, importance, strength=1.0)


def test_more_rows_of_embeddings_are_no_other_base(caplog):
    importance = uniform(tiny_model(), "all-linear")
    for rows in (50, 64):
        resized = tiny_model()
        resized.config = copy.deepcopy(resized.config)  # those of all tests are one
        resized.resize_token_embeddings(rows, mean_resizing=False)
        with caplog.at_level(logging.INFO, "forgetless"):
            Penalty(get_peft_model(resized, LoraConfig(**LORA)), importance, strength=1.0)
        assert "more rows than the 48 that they were recorded with" in caplog.text
        caplog.clear()
    other = tiny_model()
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="recorded on another base model"):
        Penalty(get_peft_model(other, LoraConfig(**LORA)), importance, strength=1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [{"bias": "all"}, {"lora_bias": True}, *WRAPPED])
def test_what_is_trained_beside_the_factors_is_said_and_covered_by_a_budget(config, caplog):
    """With all held factors at zero the model was off the base, and nothing said so."""
    base = said_by(tiny_model("qwen"))
    importance = uniform(tiny_model("qwen"), "all-linear")
    adapted = get_peft_model(tiny_model("qwen"), LoraConfig(**LORA, **config))
    Penalty(adapted, importance, strength=1.0)
    assert "trained parameters are not held, first" in caplog.text
    update = Update(adapted)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    said = said_by(adapted)
    update.keep()
    update.scale(0)
    torch.testing.assert_close(said_by(adapted), base, atol=1e-5, rtol=1e-5)
    update.scale(1)
    assert torch.equal(said_by(adapted), said)


def test_nothing_is_said_where_all_that_is_trained_is_held(caplog):
    adapted = get_peft_model(tiny_model(), LoraConfig(**LORA))
    Penalty(adapted, uniform(tiny_model(), "all-linear"), strength=1.0)
    assert "not held" not in caplog.text
