"""Recording importance of q_proj and v_proj on small random Llamas.

Every estimator is set against the diagonal Fisher of all parameters as EWC-LoRA takes it.

The baseline's gradients come one example at a time, a forward and a backward pass each with all
parameters trainable, squared and summed (our own code). Each estimator runs as `forgetless record`
runs it, 16 sequences at a time. "kept" is what stays in memory between batches: sums, and for the
baseline the gradients it squares, for `path` the adapter and AdamW's moments. "file" is what is
saved.

    python benchmarks/recording.py [--tokens 4096]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from measure import alternate, append, row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.record.activation import Activation
from forgetless.record.fisher import Fisher
from forgetless.record.kronecker import Kronecker
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.path import PathIntegral
from forgetless.record.path_factored import PathFactored
from forgetless.record.path_recorder import PathRecorder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QV, LENGTH, BATCH, LAYERS, VOCABULARY = "q_proj,v_proj", 128, 16, 4, 4096
WIDTH, GROWTH = 256, (128, 256, 512)
BASELINE = "f32 Fisher of all parameters"
# Scored tokens behind the lab model's frontiers (docs/quality.md): on sciq, rank 16 from 1/32 of
# the text (its first 9 documents) forgets less than the f32 diagonal from all of it. How few tokens
# the diagonal could do with was not tried.
FRONTIER_TOKENS = {BASELINE: 221_390, "kronecker:16": 4_702}


def lab_model(width: int) -> nn.Module:
    """A randomly initialised Llama: 4 million parameters at width 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def full_fisher(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The baseline: squared gradients of the loss of each example (a row of ids), summed, for all
    parameters.
    """
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for example in ids:
        model.zero_grad()
        model(input_ids=example[None], labels=example[None]).loss.backward()
        for total, p in zip(sums, model.parameters(), strict=True):
            total.addcmul_(p.grad, p.grad)  # type: ignore[arg-type]
    return sums


def observe(recorder: ObservingRecorder, ids: Tensor) -> tuple[Importance, int]:
    """One pass with the bare model; importance, and the bytes of the sums."""
    for batch in ids.split(BATCH):
        recorder.observe(batch)
    kept = held(recorder.state_dict())
    return recorder.finish(), kept


def train(
    recorder_type: type[PathRecorder], base: nn.Module, ids: Tensor
) -> tuple[Importance, int]:
    """The path integral: a fresh adapter trained for one pass; importance, and the bytes of sums,
    adapter, its gradients and moments.
    """
    model = add_adapter(base, names=QV, rank=8, alpha=32)
    factors = [p for p in model.parameters() if p.requires_grad]
    recorder, optimizer = recorder_type(model), torch.optim.AdamW(factors, lr=5e-4)
    with recorder.attach(optimizer):
        for batch in ids.split(BATCH):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    kept = held(recorder.state_dict()) + 4 * held(factors)
    importance = recorder.finish()
    model.unload()
    return importance, kept


def held(state: Any) -> int:
    """Bytes of all tensors in nested dictionaries and sequences."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    parts: Iterable[Any] = (
        state.values()
        if isinstance(state, dict)
        else state
        if isinstance(state, (list, tuple))
        else ()
    )
    return sum(held(part) for part in parts)


def estimators(width: int, ids: Tensor) -> dict[str, Callable[[], tuple[Importance, int]]]:
    """Name -> a call that records from `ids`."""
    model = lab_model(width)

    def factored() -> tuple[Importance, int]:
        importance, kept = observe(Fisher(model, QV), ids)
        return importance.to_tier("factored"), kept

    return {
        "path": lambda: train(PathIntegral, model, ids),
        "path-factored": lambda: train(PathFactored, model, ids),
        "fisher f32": lambda: observe(Fisher(model, QV), ids),
        "fisher factored": factored,
        "kronecker:16": lambda: observe(Kronecker(model, QV, rank=16), ids),
        "activation": lambda: observe(Activation(model, QV), ids),
    }


def case(
    what: str, width: int, tokens: int, rounds: int, only: tuple[str, ...] = ()
) -> dict[str, list[float]]:
    """Time all of them in turn, append ms per 1,000 tokens, and return those."""
    ids = torch.randint(VOCABULARY, (tokens // LENGTH, LENGTH), device=DEVICE)
    full = lab_model(width)
    calls: dict[str, Callable[[], Any]] = {BASELINE: lambda: full_fisher(full, ids)}
    calls |= {
        name: call for name, call in estimators(width, ids).items() if not only or name in only
    }
    times = alternate(calls, seconds=0, least=rounds)
    per_thousand = {name: [ms * 1e3 / tokens for ms in values] for name, values in times.items()}
    base = per_thousand[BASELINE]
    shape = f"{LAYERS} blocks of width {width}"
    append(
        [
            row(
                what,
                values,
                shape=shape,
                tier=name,
                tokens=tokens,
                unit="ms per 1,000 tokens",
                against=base,
                baseline=BASELINE,
            )
            for name, values in per_thousand.items()
        ]
    )
    return per_thousand


def to_the_frontier(per_thousand: dict[str, list[float]]) -> None:
    """Seconds for as much text as each one's frontier takes, from the times per 1,000 tokens, which
    do not depend on how many there are.
    """
    shape = f"{LAYERS} blocks of width {WIDTH}"
    seconds = {
        name: [ms * tokens / 1e6 for ms in per_thousand[name]]
        for name, tokens in FRONTIER_TOKENS.items()
    }
    append(
        [
            row(
                "recording to the frontier",
                seconds[name],
                shape=shape,
                tier=name,
                tokens=tokens,
                unit="s",
                against=seconds[BASELINE],
                baseline=BASELINE,
            )
            for name, tokens in FRONTIER_TOKENS.items()
        ]
    )


def bytes_of(width: int) -> None:
    """What is kept while recording, and the size of the file."""
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), device=DEVICE)
    shape = f"{LAYERS} blocks of width {width}"
    parameters = 4 * sum(p.numel() for p in lab_model(width).parameters())
    rows = [
        row(
            "recording, bytes",
            [2 * parameters / 2**20],
            shape=shape,
            tier=BASELINE,
            unit="MiB kept",
        ),
        row(
            "recording, bytes",
            [parameters / 2**20],
            shape=shape,
            tier=BASELINE,
            unit="MiB in the file",
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, call in estimators(width, ids).items():
            importance, kept = call()
            path = Path(folder) / "importance.safetensors"
            Importance(importance.entries, {}, importance.info).save(path)
            for count, whole, unit in (
                (kept, 2 * parameters, "MiB kept"),
                (path.stat().st_size, parameters, "MiB in the file"),
            ):
                rows.append(
                    row(
                        "recording, bytes",
                        [count / 2**20],
                        shape=shape,
                        tier=name,
                        unit=unit,
                        against=[whole / 2**20],
                        baseline=BASELINE,
                    )
                )
    append(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        help="tokens of each recording; growth also takes half as many",
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    to_the_frontier(case("recording", WIDTH, options.tokens, options.rounds))
    for width in GROWTH:
        case(
            "recording, growth with width",
            width,
            options.tokens // 2,
            2,
            only=("fisher f32", "kronecker:16"),
        )
    for tokens in (options.tokens // 2, options.tokens * 2):
        case("recording, growth with tokens", WIDTH, tokens, 2, only=("kronecker:16",))
    for width in GROWTH:
        bytes_of(width)


if __name__ == "__main__":
    main()
