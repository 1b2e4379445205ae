"""Memory and time per process with 1, 2 and 4 processes (gloo, CPU).

Measured are importance that is shared out over them, its pull, and a path recorder's sums.

Layers and nothing else, LoRA of rank 8, as in pull.py. Memory is what one process keeps, the
largest of all. Time is the CPU time of one process for one pull, messages included, the median of
all processes: on fewer cores than processes, wall time would show the waiting. A pull by one
process of everything is the baseline; where processes pull alike without sharing, each takes that.

    python benchmarks/processes.py [--seconds 3]
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import append, in_tiers, percentile, row
from pull import adapted

from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.targets import target_weights
from forgetless.penalty import sharing
from forgetless.penalty.pull import Penalty
from forgetless.record.path import PathIntegral

TIERS = ("f32", "u8", "factored", "kronecker:16")
SIZES = ((8, 512), (8, 1024), (8, 2048), (16, 1024))  # weights, width
MIB = 2**20


def one_process(rank: int, count: int, port: int, seconds: float, out: str) -> None:
    """Measure every size and tier in this process, together with the others."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count)
    )
    torch.set_num_threads(1)
    distributed.start("cpu")
    found = {}
    for depth, width in SIZES:
        torch.manual_seed(0)
        model = adapted([(width, width)] * depth, 8)
        weights = target_weights(model)
        sums = PathIntegral(model).state_dict()
        kept = sum(
            part.numel() * part.element_size()
            for key in ("credit", "omega")
            for parts in sums[key].values()
            for part in parts
        )
        found[depth, width, "path sums"] = (kept / MIB, [])
        whole = in_tiers({weights[0].name: (width, width)}, tiers=TIERS)
        for tier, one in whole.items():
            entry = one[weights[0].name]
            copies = {weight.name: _copy(entry) for weight in weights}
            penalty = Penalty(model, Importance(copies), strength=0.1, shard=count > 1)
            found[depth, width, tier] = (0.0, pulls(penalty, seconds))
            found[depth, width, tier] = (
                sharing.memory(penalty.importance.entries) / MIB,
                found[depth, width, tier][1],
            )
    torch.save(found, f"{out}.{rank}")
    distributed.barrier()


def _copy(entry: Any) -> Any:
    from forgetless.importance.entries import with_tensors

    return with_tensors(entry, torch.clone, {})


def pulls(penalty: Penalty, seconds: float) -> list[float]:
    """CPU ms of each pull after the first; as many in every process."""
    times: list[float] = []
    penalty.pull()
    started = time.perf_counter()
    rounds = 5
    while len(times) < rounds:
        start = time.process_time()
        penalty.pull()
        times.append((time.process_time() - start) * 1e3)
        if len(times) == 5:  # the first process says how many more
            rounds = distributed.collect(
                min(30, 5 + int(seconds / max(time.perf_counter() - started, 1e-3) * 5))
            )[0]
    return times


def measured(count: int, seconds: float) -> list[dict[Any, tuple[float, list[float]]]]:
    """What each of `count` processes found."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = str(Path(folder) / "found")
        torch.multiprocessing.spawn(one_process, (count, port, seconds, out), nprocs=count)
        return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(count)]


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="per tier and size")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    alone: dict[Any, tuple[float, float]] = {}
    rows = []
    for count in (1, 2, 4):
        found = measured(count, seconds)
        for case in found[0]:
            depth, width, tier = case
            memory = max(each[case][0] for each in found)
            times = [percentile(each[case][1], 0.5) for each in found if each[case][1]]
            alone.setdefault(case, (memory, times[0] if times else 0.0))
            shape = f"{depth} x ({width}, {width}), {count} processes"
            rows.append(
                row(
                    "kept per process",
                    [memory],
                    shape=shape,
                    tier=tier,
                    rank=8,
                    unit="MiB",
                    against=[alone[case][0]],
                    baseline="1 process",
                )
            )
            if times:
                rows.append(
                    row(
                        "pull per process",
                        [percentile(times, 0.5)],
                        shape=shape,
                        tier=tier,
                        rank=8,
                        unit="ms",
                        against=[alone[case][1]],
                        baseline="1 process",
                    )
                )
    append(rows)


if __name__ == "__main__":
    main()
