"""What `forgetless plan` says against what is measured.

Compared are file sizes, peak memory while recording and tuning, and the time of a step and of its
pull.

Each measurement of memory is a process of its own: the high-water mark of resident memory, less
what Python and the libraries took before the model was loaded and a tiny one trained. There glibc
maps every tensor by itself and gives it back at once, so that the peak is what tensors take; the
time, and the peak with glibc's own heap, are those of another process. A randomly initialised Llama
of medium width, so that one core does it in a few minutes; f32. The table is appended to
results.csv: `ratio` is what was measured divided by what the plan says.

    python benchmarks/plan.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Row, append, clock, row
from transformers import AutoModelForCausalLM, LlamaConfig

from forgetless.data.traces import traces_of
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.options.plan import PlanOptions
from forgetless.penalty.pull import Penalty
from forgetless.plan.plan import plan
from forgetless.record.kronecker import Kronecker

MIB = 2**20
SHAPE = "4 blocks, width 512"
LENGTH, TOKENS = 256, 1024
TIERS = ("kronecker:64", "f32", "u8", "factored")


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


def planned(model: Path, tier: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        return plan(
            PlanOptions(
                model=str(model),
                tier=tier,
                tokens=TOKENS,
                record_tokens=TOKENS,
                length=LENGTH,
                accumulation=1,
                general_tokens=4 * TOKENS,
            )
        )


def warm_up() -> int:
    """Everything that is imported and allocated once, by a step of a tiny model; the resident
    memory after it.
    """
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    tiny = add_adapter(
        AutoModelForCausalLM.from_config(config), names="all-linear", rank=2, alpha=4
    )
    optimizer = torch.optim.AdamW([p for p in tiny.parameters() if p.requires_grad])
    ids = torch.zeros(1, 4, dtype=torch.long)
    tiny(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return resident("VmRSS")


def recorded(model: Path, out: Path) -> dict[str, float]:
    """Record, in this process: seconds per 4 batches and bytes above what the libraries took."""
    before = warm_up()
    base = AutoModelForCausalLM.from_pretrained(model)
    recorder, spent = Kronecker(base, rank=64), []
    for _ in range(5):
        start = clock()
        recorder.observe(torch.randint(4096, (TOKENS // LENGTH, LENGTH)))
        spent.append(clock() - start)
    peak = resident("VmHWM") - before
    importance = recorder.finish()
    # As `record` says what text it was; this one has no words, so others of usual number.
    texts = [" ".join(f"{n}x{word}" for word in range(192)) for n in range(4 * TOKENS // 256)]
    data = {"source": "random", "sha256": "0" * 64, "traces": traces_of(texts).plain()}
    Importance(importance.entries, {}, {**importance.info, "data": data}).save(out)
    return {"seconds": sum(spent[1:]), "bytes": peak}


def tuned(model: Path, file: str) -> dict[str, float]:
    """A few steps with a pull: median seconds of step and pull, and bytes above what the libraries
    took.
    """
    before = warm_up()
    adapted = add_adapter(
        AutoModelForCausalLM.from_pretrained(model), names="all-linear", rank=8, alpha=32
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    penalty = Penalty(adapted, Importance.load(file), strength=1.0)
    steps, pulls = [], []
    for _ in range(7):
        ids = torch.randint(4096, (TOKENS // LENGTH, LENGTH))
        start = clock()
        adapted(input_ids=ids, labels=ids).loss.backward()
        middle = clock()
        penalty.pull()
        end = clock()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(clock() - end + middle - start)
        pulls.append(end - middle)
    middle_of = lambda values: sorted(values[1:])[len(values) // 2 - 1]
    return {"step": middle_of(steps), "pull": middle_of(pulls), "bytes": resident("VmHWM") - before}


def alone(*words: object) -> dict[str, float]:
    """What this script prints in a fresh process, `bytes` as glibc's heap has it, `exact` with
    every tensor mapped by itself.
    """
    plainly = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    found = []
    for settings in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}):
        done = subprocess.run(
            [sys.executable, __file__, *map(str, words)],
            capture_output=True,
            text=True,
            check=True,
            env={**plainly, "OMP_NUM_THREADS": "1", **settings},
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {**found[0], "exact": found[1]["bytes"]}


def compared(what: str, tier: str, said: float, found: float, unit: str) -> Row:
    line = row(what, [found], shape=SHAPE, tier=tier, tokens=TOKENS, rank=8, unit=unit)
    return Row(**{**line.__dict__, "ratio": found / said, "baseline": "planned"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args().job
    if given:
        measure = recorded if given[0] == "record" else tuned
        print(json.dumps(measure(Path(given[1]), given[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, first = Path(folder) / "model", Path(folder) / "kronecker-64.safetensors"
        make_model(model)
        recording, said = alone("record", model, first), planned(model, TIERS[0])
        need = sum(said["memory"]["recording"].values()) / MIB
        rows = [
            compared("plan: recording peak", "kronecker:64", need, recording["exact"] / MIB, "MiB"),
            compared(
                "plan: recording peak, glibc's heap",
                "kronecker:64",
                need,
                recording["bytes"] / MIB,
                "MiB",
            ),
            compared(
                "plan: recording time",
                "kronecker:64",
                said["seconds"]["recording"],
                recording["seconds"],
                "s",
            ),
        ]
        whole = Importance.load(first)
        for tier in TIERS:
            file = first.with_name(f"{tier.replace(':', '-')}.safetensors")
            if file != first:
                whole.to_tier(tier).save(file)
            found, said = alone("tune", model, file), planned(model, tier)
            rows += [
                compared(
                    "plan: file", tier, said["files"][tier] / MIB, file.stat().st_size / MIB, "MiB"
                ),
                compared(
                    "plan: tuning peak",
                    tier,
                    sum(said["memory"]["tuning"].values()) / MIB,
                    found["exact"] / MIB,
                    "MiB",
                ),
                compared(
                    "plan: tuning peak, glibc's heap",
                    tier,
                    sum(said["memory"]["tuning"].values()) / MIB,
                    found["bytes"] / MIB,
                    "MiB",
                ),
                compared(
                    "plan: step", tier, 1e3 * said["seconds"]["step"], 1e3 * found["step"], "ms"
                ),
                compared(
                    "plan: pull", tier, 1e3 * said["seconds"]["pull"], 1e3 * found["pull"], "ms"
                ),
            ]
        append(rows)


if __name__ == "__main__":
    main()
