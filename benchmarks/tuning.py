"""A tuning step with and without the pull, and the peak memory of both.

The model is a small randomly initialised Llama with the widths of Llama-3.2-1B, two blocks and a
vocabulary of 8,192: what one core can do. The pulls of all tiers are timed one after the other
within each step, in an order that moves on by one each step, and set against the rest of that step,
so that the noise of whole steps does not hide them. Where a step takes over a minute, there are no
more tokens to try. Memory is the high-water mark of a process of its own that loads the importance
from its file, all linear layers targeted.

    python benchmarks/tuning.py [--tokens 512,2048,8192]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measure import append, clock, in_tiers, row, synchronize
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.linear import base_shapes
from forgetless.model.targets import target_weights
from forgetless.penalty.pull import Penalty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, LENGTH = 2, 512
QV = "q_proj,v_proj"
STEP_TIERS = ("f32", "u8", "u4", "factored", "kronecker", "kronecker:16")
MEMORY_TIERS = ("f32", "u8", "u4", "factored", "kronecker:16")
LONGEST = 60.0  # seconds of a step on a CPU
MIB = 2**20


def base_model() -> nn.Module:
    """Two blocks of Llama-3.2-1B's widths, randomly initialised; bf16 on a GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(
        DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32
    )


def one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    penalties: dict[str, Penalty],
) -> dict[str, float]:
    """ms of each penalty's pull, and under "no pull" of all the rest of the step."""
    synchronize()
    start = clock()
    model(input_ids=ids, labels=ids).loss.backward()
    synchronize()
    spent = {"no pull": clock() - start}
    for tier, penalty in penalties.items():
        start = clock()
        penalty.pull()
        synchronize()
        spent[tier] = clock() - start
    start = clock()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    spent["no pull"] += clock() - start
    return {tier: seconds * 1e3 for tier, seconds in spent.items()}


def steps(token_counts: list[int], rounds: int) -> None:
    """Steps with the pull of every tier on q_proj and v_proj, each timed."""
    model = add_adapter(base_model(), names=QV, rank=8, alpha=32)
    weights = target_weights(model)
    optimizer = torch.optim.AdamW([p for w in weights for p in w.parameters], lr=1e-4)
    penalties = {
        tier: Penalty(model, i, strength=1e-3)
        for tier, i in in_tiers({w.name: w.shape for w in weights}, DEVICE, STEP_TIERS).items()
    }
    shape = f"{LAYERS} blocks of Llama-3.2-1B"
    per_token = 0.0
    for tokens in token_counts:
        if DEVICE == "cpu" and per_token * tokens > LONGEST:
            print(f"{tokens} tokens: left out, a step would take {per_token * tokens:.0f} s")
            continue
        ids = torch.randint(8192, (max(1, tokens // LENGTH), min(tokens, LENGTH)), device=DEVICE)
        one_step(model, optimizer, ids[:1], penalties)  # the first is slower
        fitting = (
            int(2 * LONGEST / (per_token * tokens)) if DEVICE == "cpu" and per_token else rounds
        )
        measured = [
            one_step(model, optimizer, ids, in_turn(penalties, turn))
            for turn in range(max(1, min(rounds, fitting)))
        ]
        per_token = measured[-1]["no pull"] / 1e3 / tokens
        plain = [spent["no pull"] for spent in measured]
        rows = [row("tuning step", plain, shape=shape, tier="no pull", tokens=tokens, rank=8)]
        for tier in penalties:
            whole = [spent["no pull"] + spent[tier] for spent in measured]
            rows.append(
                row(
                    "tuning step",
                    whole,
                    shape=shape,
                    tier=tier,
                    tokens=tokens,
                    rank=8,
                    against=plain,
                    baseline="no pull",
                )
            )
        append(rows)


def in_turn(penalties: dict[str, Penalty], turn: int) -> dict[str, Penalty]:
    """The same, starting `turn` places further on."""
    names = list(penalties)
    first = turn % len(names)
    return {name: penalties[name] for name in names[first:] + names[:first]}


def memory(repeats: int) -> None:
    """Peak resident memory with each tier against none, per target weight."""
    with tempfile.TemporaryDirectory() as folder:
        model = base_model()
        shapes = base_shapes(add_adapter(model, names="all-linear", rank=8, alpha=32))
        shapes = {name: shape for name, shape in shapes.items() if "lm_head" not in name}
        count = sum(out * into for out, into in shapes.values())
        del model
        files = {"no pull": ""}
        for tier, importance in in_tiers(shapes, tiers=MEMORY_TIERS).items():
            files[tier] = str(Path(folder) / f"{tier.replace(':', '-')}.safetensors")
            importance.save(files[tier])
        peaks: dict[str, list[float]] = {tier: [] for tier in files}
        for _ in range(repeats):
            for tier, file in files.items():
                peaks[tier].append(_peak_of_process(file))
    shape = f"{LAYERS} blocks of Llama-3.2-1B, all linear"
    none = peaks.pop("no pull")
    rows = [row("peak memory", none, shape=shape, tier="no pull", tokens=128, rank=8, unit="MiB")]
    for tier, values in peaks.items():
        rows.append(
            row(
                "peak memory",
                values,
                shape=shape,
                tier=tier,
                tokens=128,
                rank=8,
                unit="MiB",
                against=none,
                baseline="no pull",
            )
        )
        extra = [(value - other) * MIB / count for value, other in zip(values, none, strict=True)]
        rows.append(
            row(
                "added memory",
                extra,
                shape=shape,
                tier=tier,
                tokens=128,
                rank=8,
                unit="bytes per weight",
            )
        )
    append(rows)


def _peak_of_process(file: str) -> float:
    """MiB. glibc gives freed memory back here: what it would keep is not what is needed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, __file__, "--peak", file],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak(file: str) -> float:
    """MiB of resident memory (of the GPU where there is one) at the highest, over two steps of 128
    tokens with the importance in `file`, or without.
    """
    model = add_adapter(base_model(), names="all-linear", rank=8, alpha=32)
    penalty = Penalty(model, Importance.load(file), strength=1e-3) if file else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):
        one_step(
            model,
            optimizer,
            torch.randint(8192, (1, 128), device=DEVICE),
            {} if penalty is None else {"pull": penalty},
        )
    return torch.cuda.max_memory_allocated() / MIB if DEVICE == "cuda" else high_water()


def high_water() -> float:
    """MiB of resident memory at the highest.

    Not getrusage: after an exec its ru_maxrss still holds the peak of the process that started this
    one.
    """
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", default="512,2048,8192", help="tokens per step, separated by commas"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("steps", "memory"), help="one of the two only")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(peak(options.peak)))
    else:
        if options.part != "memory":
            steps([int(part) for part in options.tokens.split(",")], options.rounds)
        if options.part != "steps":
            memory(repeats=2)
