"""Tiny random models, built from configurations: no network, no files."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, GPTJConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

SMALL = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "qwen": Qwen2Config(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "phi3": Phi3Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
    "gptj": GPTJConfig(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, bos_token_id=1, eos_token_id=2),
}


@pytest.fixture
def tiny():
    """A function: architecture name -> a tiny random model in f32 (or the dtype given), the same at every call."""

    def build(kind: str = "llama", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)

    return build


@pytest.fixture
def batch():
    """Token ids (4, 12)."""
    return torch.randint(3, 48, (4, 12), generator=torch.Generator().manual_seed(1))
