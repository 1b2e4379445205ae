"""Architectures that transformers ships, as tiny random models: layers that read every token in
another shape, and layers that no text reaches. The whole way of each is slow.
"""

import logging

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from conftest import SMALL, interrupt_after, words_tokenizer
from forgetless.cli import main
from forgetless.data.encoding import collate
from forgetless.model.adapters import add_adapter
from forgetless.model.linear import matching
from forgetless.model.targets import target_weights
from forgetless.record import record as recording_verb
from forgetless.record.fisher import Fisher
from forgetless.record.watching import every_token

OPT = dict(
    vocab_size=48,
    hidden_size=16,
    ffn_dim=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    word_embed_proj_dim=16,
    dropout=0.0,
    pad_token_id=0,
)
QWEN2_MOE = dict(
    **SMALL,
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
)
DEEPSEEK = dict(
    **{**SMALL, "num_key_value_heads": 2},
    n_routed_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=8,
    n_group=1,
    topk_group=1,
    q_lora_rank=4,
    kv_lora_rank=4,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    first_k_dense_replace=1,
)
VISION = dict(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    model_type="siglip_vision_model",
)


def made(name, **config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**config)
    ).eval()


def sees_images():
    """Gemma 3 with its vision tower."""
    torch.manual_seed(0)
    text = transformers.Gemma3TextConfig(**SMALL, head_dim=8).to_dict()
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    ).eval()


@pytest.mark.parametrize(
    "name, config, kinds",
    [
        ("OPTConfig", OPT, "fc1,fc2"),
        ("Qwen2MoeConfig", QWEN2_MOE, "gate_proj,down_proj,shared_expert_gate"),
        ("DeepseekV3Config", DEEPSEEK, "kv_b_proj,gate_proj,down_proj"),
    ],
)
def test_layers_that_read_every_token_in_another_shape_are_recorded(name, config, kinds):
    """They were taken for experts, which see some tokens, and refused."""
    model = made(name, **config)
    g = torch.Generator().manual_seed(2)
    pieces = [(torch.randint(3, 48, (n,), generator=g).tolist(), [True] * n) for n in (9, 6, 9)]
    recorder = Fisher(model, kinds)
    recorder.observe(**collate(pieces, 0))
    importance = recorder.finish()
    weights = target_weights(model, names=kinds)
    squares = dict.fromkeys(importance, 0)
    for ids, _ in pieces:
        row = torch.tensor([ids])
        loss = nn.functional.cross_entropy(
            model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="sum"
        )
        gradients = torch.autograd.grad(loss, [weight.W for weight in weights])
        for weight, gradient in zip(weights, gradients, strict=True):
            squares[weight.name] = squares[weight.name] + gradient**2
    assert set(importance) == {weight.name for weight in weights}
    for weight in weights:
        expected = squares[weight.name] / (8 + 5 + 8)
        torch.testing.assert_close(importance[weight.name].values, expected, rtol=1e-4, atol=1e-9)


def test_which_rows_are_all_tokens():
    counts = torch.ones(2, 3, dtype=torch.bool)
    for shape in ((2, 3, 4), (6, 4), (2, 1, 3, 4), (2, 3, 1, 4)):
        assert every_token(torch.zeros(shape), counts).shape == (2, 3, 4)
    for shape in ((3, 2, 4), (5, 4), (2, 2, 3, 4), (2, 6, 4), (3, 4)):
        assert every_token(torch.zeros(shape), counts) is None
    one = torch.ones(1, 1, dtype=torch.bool)
    assert every_token(torch.zeros(1, 4), one).shape == (1, 1, 4)


def test_layers_that_no_text_reaches_are_left_out(caplog):
    model = sees_images()
    assert all("language_model" in path for path, _ in matching(model, "all-linear"))
    assert all("language_model" in path for path, _ in matching(model, "q_proj"))
    assert any("vision" in path for path, _ in matching(model, ".*q_proj"))
    with caplog.at_level(logging.INFO, "forgetless"):
        adapted = add_adapter(model, names="all-linear", rank=2, alpha=2)
    assert "layers that read no text are left out" in caplog.text
    assert all("language_model" in weight.name for weight in target_weights(adapted))
    recorder = Fisher(sees_images())
    recorder.observe(torch.randint(3, 48, (2, 8)))
    assert len(recorder.finish()) == 14


def test_experts_are_refused_before_any_text_is_read(tmp_path, text_file, capsys, monkeypatch):
    """All text was read, or sampled for minutes, and then the targets refused."""
    made("MixtralConfig", **SMALL, num_local_experts=2).save_pretrained(tmp_path / "mixture")
    words_tokenizer().save_pretrained(tmp_path / "mixture")
    monkeypatch.setattr(recording_verb, "general_text", lambda *given: pytest.fail("text was read"))
    words = ["record", str(tmp_path / "mixture"), "--general", str(text_file), "--targets"]
    words += ["gate_up_proj", "--out", str(tmp_path / "i.safetensors"), "--device", "cpu"]
    assert main(words) == 1
    assert "fused expert tensors of mixture models" in capsys.readouterr().err


HYBRID = dict(
    **SMALL,
    head_dim=8,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    layer_types=["linear_attention", "full_attention"],
)
GEMMA4 = dict(
    **SMALL,
    head_dim=8,
    global_head_dim=8,
    vocab_size_per_layer_input=48,
    hidden_size_per_layer_input=8,
    layer_types=["sliding_attention", "full_attention"],
    final_logit_softcapping=30.0,
    sliding_window=8,
)
MOE = dict(**SMALL, num_experts_per_tok=1)
# name -> (class of the configuration, configuration). What transformers ships and people tune.
ARCHITECTURES = {
    "Llama": ("LlamaConfig", SMALL),
    "Llama, tied": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "Mistral, sliding window": ("MistralConfig", {**SMALL, "sliding_window": 8}),
    "Qwen 2.5": ("Qwen2Config", SMALL),
    "Qwen 3": ("Qwen3Config", {**SMALL, "head_dim": 8}),
    "Qwen 3.5": ("Qwen3_5TextConfig", HYBRID),
    "Qwen 3 Next": (
        "Qwen3NextConfig",
        {**HYBRID, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        | {"shared_expert_intermediate_size": 8},
    ),
    "Gemma": ("GemmaConfig", {**SMALL, "head_dim": 8}),
    "Gemma 2": ("Gemma2Config", {**SMALL, "head_dim": 8, "sliding_window": 8}),
    "Gemma 3": (
        "Gemma3TextConfig",
        {**SMALL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Gemma 4": ("Gemma4TextConfig", GEMMA4),
    "Phi": ("PhiConfig", {**SMALL, "num_key_value_heads": 2}),
    "Phi 3 and 4": ("Phi3Config", SMALL),
    "SmolLM 3": ("SmolLM3Config", SMALL),
    "OLMo 2": ("Olmo2Config", SMALL),
    "OLMo 3": (
        "Olmo3Config",
        {**SMALL, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    "Granite": ("GraniteConfig", {**SMALL, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "OPT": ("OPTConfig", OPT),
    "GPT-2": (
        "GPT2Config",
        dict(vocab_size=48, n_positions=64, n_embd=16, n_layer=2, n_head=2)
        | dict(bos_token_id=1, eos_token_id=2),
    ),
    "GPT-NeoX": ("GPTNeoXConfig", SMALL),
    "Bloom": (
        "BloomConfig",
        dict(vocab_size=48, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0),
    ),
    "Falcon": (
        "FalconConfig",
        dict(vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        | dict(bos_token_id=1, eos_token_id=2),
    ),
    "StarCoder 2": ("Starcoder2Config", SMALL),
    "GLM 4": ("Glm4Config", {**SMALL, "head_dim": 8}),
    "Cohere 2": ("Cohere2Config", {**SMALL, "head_dim": 8}),
    "LFM 2": ("Lfm2Config", {**SMALL, "layer_types": ["conv", "full_attention"]}),
    "Mixtral": ("MixtralConfig", {**MOE, "num_local_experts": 2}),
    "Qwen 2 MoE": ("Qwen2MoeConfig", QWEN2_MOE),
    "Qwen 3 MoE": (
        "Qwen3MoeConfig",
        {**MOE, "head_dim": 8, "num_experts": 2, "moe_intermediate_size": 8},
    ),
    "DeepSeek V3": ("DeepseekV3Config", DEEPSEEK),
    "gpt-oss": ("GptOssConfig", {**MOE, "head_dim": 8, "num_local_experts": 2}),
}


def said_by(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(3, 30)[None]).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ARCHITECTURES, "Gemma 3 with images"])
def test_the_whole_way(name, text_file, tmp_path, monkeypatch):
    """Record, tune, interrupt, resume, eval, merge; the merged model says what the adapter says."""
    kind, config = ARCHITECTURES.get(name, ("", {}))
    model = made(kind, **config) if kind else sees_images()
    model.save_pretrained(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    base, out = str(tmp_path / "model"), str(tmp_path / "run")
    text, i = str(text_file), str(tmp_path / "i.safetensors")
    common = ["--device", "cpu", "--quiet"]
    recording = ["--general", text, "--documents", "4", "--length", "16", "--cov-rank", "4"]
    assert main(["record", base, *recording, "--out", i, *common]) == 0
    tuning = ["tune", base, "--data", text, "--general", "none", "--out", out, "--method", "hold"]
    tuning += ["--importance", i, "--rank", "2", "--max-steps", "4", "--batch-size", "2"]
    tuning += ["--learning-rate", "0.01", "--save-steps", "1", "--length", "16", *common]
    interrupt_after(monkeypatch, 2)
    assert main(tuning) == 130
    assert main([*tuning, "--resume"]) == 0
    assert main(["eval", base, "--adapter", out, "--general", text, "--limit", "4", *common]) == 0
    merged = str(tmp_path / "merged")
    assert main(["merge", out, "--out", merged, "--dtype", "float32", "--quiet"]) == 0
    adapted = said_by(base, f"{out}/final")
    moved = (adapted - said_by(base)).norm()
    assert moved > 0 and (said_by(merged) - adapted).norm() < 1e-3 * moved
