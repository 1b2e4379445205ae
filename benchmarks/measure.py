"""Timing side by side, and benchmarks/results.csv: one row per measurement, only ever appended."""

from __future__ import annotations

import csv
import datetime
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from forgetless.files.provenance import environment
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance

# On a CPU the CPU time of our one thread, so that what others run does not count.
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
RESULTS = Path(__file__).with_name("results.csv")
# Those that this version of the package does not have are left out.
TIERS = ("f32", "bf16", "u8", "u4", "factored", "kronecker:16")


@dataclass(frozen=True)
class Row:
    """One measurement; `ratio` is this divided by `baseline`, paired within each round."""

    what: str
    shape: str
    tier: str
    tokens: int | None
    rank: int | None
    median: float
    p20: float
    p80: float
    unit: str
    ratio: float | None
    baseline: str
    device: str
    versions: str
    commit: str
    date: str


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of the values do not exceed, interpolated."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


def alternate(
    contenders: dict[str, Callable[[], Any]], *, seconds: float, least: int = 5, most: int = 31
) -> dict[str, list[float]]:
    """ms of each contender, called in turn, round after round, for about `seconds`; the first round
    is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    started, rounds = time.perf_counter(), -1
    while rounds < least or (rounds < most and time.perf_counter() - started < seconds):
        for name, call in contenders.items():
            synchronize()
            start = clock()
            call()
            synchronize()
            if rounds >= 0:
                times[name].append((clock() - start) * 1e3)
        rounds += 1
    return times


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(
    what: str,
    values: list[float],
    *,
    shape: str,
    tier: str = "",
    tokens: int | None = None,
    rank: int | None = None,
    unit: str = "ms",
    against: list[float] | None = None,
    baseline: str = "",
) -> Row:
    """A row from repeated measurements, with the median of the paired ratios to those of the
    baseline.
    """
    ratio = (
        percentile([mine / theirs for mine, theirs in zip(values, against, strict=True)], 0.5)
        if against
        else None
    )
    env = environment()
    commit = str(env.commit or "")[:10] + ("+" if env.dirty else "")
    versions = " ".join(
        f"{name} {env.versions[name]}"
        for name in ("torch", "transformers", "peft")
        if name in env.versions
    )
    return Row(
        what,
        shape,
        tier,
        tokens,
        rank,
        percentile(values, 0.5),
        percentile(values, 0.2),
        percentile(values, 0.8),
        unit,
        ratio,
        baseline,
        device_name(),
        f"python {env.python} {versions}",
        commit,
        datetime.date.today().isoformat(),
    )


def device_name() -> str:
    """The GPU's name, or the CPU's with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"


def append(rows: list[Row]) -> None:
    """Append to the CSV and print the rows."""
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        for each in rows:
            values = {
                key: f"{value:.6g}" if isinstance(value, float) else value
                for key, value in asdict(each).items()
            }
            writer.writerow(values)
            ratio = "" if each.ratio is None else f"{each.ratio:8.4f} of {each.baseline}"
            print(
                f"{each.what:<24} {each.shape:<28} {each.tier:<13} r {each.rank!s:<4} t "
                f"{each.tokens!s:<5} {each.median:10.4g} {each.unit:<16} {ratio}"
            )


def spread(out: int, into: int, device: str = "cpu") -> torch.Tensor:
    """Importance (out, in) over some orders of magnitude, as recorded importance has; f32."""
    return torch.randn(out, into, device=device).mul_(2).exp_()


def in_tiers(
    shapes: dict[str, tuple[int, int]], device: str = "cpu", tiers: Iterable[str] = TIERS
) -> dict[str, Importance]:
    """Importance of these weights in each tier that the package has, on `device`."""
    base = Importance({name: DenseEntry(spread(*shape, device)) for name, shape in shapes.items()})
    found = {}
    for tier in tiers:
        try:
            found[tier] = (
                covariances(shapes, int(tier.partition(":")[2] or 0), device)
                if tier.startswith("kronecker")
                else base.to_tier(tier)
            )
        except (ValueError, ImportError):  # OptionError is a ValueError: a tier of a later version
            continue
    return found


def covariances(shapes: dict[str, tuple[int, int]], rank: int, device: str) -> Importance:
    """Kronecker importance, covariances of `rank` + constant diagonal, or whole for rank 0.

    Raises ImportError in versions without it.
    """
    from forgetless.importance.covariance import Covariance, LowRankCovariance
    from forgetless.importance.entries import KroneckerEntry

    def one(width: int) -> Any:
        if not rank:
            return Covariance(
                torch.eye(width, device=device)
            )  # a product takes as long whatever the numbers
        return LowRankCovariance(
            torch.linalg.qr(torch.randn(width, rank, device=device)).Q,
            torch.rand(rank, device=device),
            torch.tensor(0.1, device=device),
        )

    return Importance(
        {name: KroneckerEntry(one(out), one(into)) for name, (out, into) in shapes.items()}
    )
