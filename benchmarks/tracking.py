"""What recording kronecker importance of all linear layers costs beside reading the text.

Reading is a forward pass and the backward pass of the inputs, without which no estimator of
gradients can do. Whole covariances are (n, n) matrices, which are cut to rank 64 at the end;
tracked ones are seen along 128 directions as the text goes by (record/tracked.py). Blocks of two
models, with random weights and a head of 4,096 tokens: SmolLM2-135M (width 576, 1,536 in the MLP)
and an 8B Llama (4,096 and 14,336). "kept" is what stays in memory between batches.

    python benchmarks/tracking.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import alternate, append, row
from recording import DEVICE, VOCABULARY, held
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.record.kronecker import Kronecker

LENGTH, BATCH, RANK = 256, 4, 64
READING, WHOLE, TRACKED = "reading alone", "whole covariances", "tracked covariances"
# Name -> (width, width of the MLP, heads, key and value heads, blocks, batches).
MODELS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 4, 3),
    "Llama 8B": (4096, 14336, 32, 8, 1, 1),
}


def blocks_of(name: str) -> nn.Module:
    """Some blocks of a model, with random weights."""
    width, inner, heads, kv_heads, blocks, _ = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DEVICE).requires_grad_(False)


def read(model: nn.Module, ids: Tensor) -> None:
    """A forward pass and the backward pass of the inputs, as a recorder makes them."""
    inputs = model.get_input_embeddings()(ids).requires_grad_(True)  # type: ignore[operator]
    logits = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()


def case(name: str, rounds: int) -> None:
    """Time of the three and bytes of the two, appended."""
    model = blocks_of(name)
    batches = MODELS[name][-1]
    texts = torch.randint(VOCABULARY, (batches, BATCH, LENGTH), device=DEVICE)
    recorders = {WHOLE: Kronecker(model), TRACKED: Kronecker(model, rank=RANK)}

    def recording(recorder: Kronecker) -> Callable[[], Any]:
        return lambda: [recorder.observe(ids) for ids in texts]

    calls: dict[str, Callable[[], Any]] = {READING: lambda: [read(model, ids) for ids in texts]}
    calls |= {name: recording(recorder) for name, recorder in recorders.items()}
    times = alternate(calls, seconds=0, least=rounds)
    tokens = texts.numel()
    rows = [
        row(
            "recording beside reading",
            [ms * 1e3 / tokens for ms in values],
            shape=f"{name}, {MODELS[name][4]} blocks",
            tier=which,
            tokens=tokens,
            unit="ms per 1,000 tokens",
            against=[ms * 1e3 / tokens for ms in times[READING]],
            baseline=READING,
        )
        for which, values in times.items()
    ]
    whole = held(recorders[WHOLE].state_dict())
    rows += [
        row(
            "recording beside reading, bytes",
            [held(recorder.state_dict()) / 2**20],
            shape=f"{name}, {MODELS[name][4]} blocks",
            tier=which,
            unit="MiB kept",
            against=[whole / 2**20],
            baseline=WHOLE,
        )
        for which, recorder in recorders.items()
    ]
    append(rows)
    for each in rows:
        print(each)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    for name in options.models:
        case(name, options.rounds)


if __name__ == "__main__":
    main()
