"""How large an importance file is, and how much arithmetic a pull takes, from the shapes of the
weights alone. Nothing is loaded or recorded.

With k the rank of a form, r that of the adapter, and n standing for out and for in (numbers; f32
unless said):

    tier           in the file             a pull on LoRA,                 a pull on full
                                           operations                      fine-tuning, operations
    f32, bf16      out in                  6 r out in + out in             3 out in
    u8, u4         out in (/ 2) codes,     the same                        the same
                   out in / 128 in bf16
    factored:k     k (out + in)            k (6 r^2 + 2 r) (out + in)      4 k out in
    kronecker      out^2 + in^2            2 r (out^2 + in^2) + 6 r^2 n    2 out in (out + in)
    kronecker:k    (k + 1) n + 1           4 k r n + 6 r^2 n               4 k out in n / n

An input covariance that several weights read is stored once. `bytes_of_file` adds the header: exact
for the tensors, and for the metadata as many characters as `record` writes for so many weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from forgetless.data.traces import planned_characters
from forgetless.files.provenance import environment
from forgetless.files.schema import to_json
from forgetless.importance import codec
from forgetless.importance.tiers import parse_tier
from forgetless.model.distributed import owners
from forgetless.options.estimators import ESTIMATORS

Shape = tuple[int, ...]
BYTES = {"F32": 4, "BF16": 2, "U8": 1}
ANY = 0.12345678901234567  # as long in JSON as most numbers are
HASH = "0" * 64


@dataclass(frozen=True)
class Planned:
    """A target weight that is not loaded: its shape, and the first weight that reads its input."""

    name: str
    shape: tuple[int, int]  # (out, in)
    leader: str

    @property
    def leads(self) -> bool:
        """Whether the input's covariance is stored with this weight."""
        return self.leader == self.name


def tensors_of(weight: Planned, tier: str) -> dict[str, tuple[Shape, str]]:
    """What a file holds for one weight in this tier, by suffix: (shape, dtype)."""
    kind, rank = parse_tier(tier)
    out, into = weight.shape
    if kind in ("f32", "bf16"):
        return {"": ((out, into), kind.upper())}
    if kind in codec.BITS:
        width = into if codec.BITS[kind] == 8 else -(-into // 2)
        return {".codes": ((out, width), "U8"), ".scale": ((out, -(-into // codec.BLOCK)), "BF16")}
    if kind == "factored":
        return {".row": ((out, rank or 1), "F32"), ".col": ((into, rank or 1), "F32")}
    found: dict[str, tuple[Shape, str]] = {}
    for side, n in ((".out_cov", out), (".in_cov", into)):
        if side == ".in_cov" and not weight.leads:
            continue
        if rank is None:
            found[side] = ((n, n), "F32")
        else:
            k = min(rank, n)
            found.update(
                {
                    f"{side}.vectors": ((n, k), "F32"),
                    f"{side}.values": ((k,), "F32"),
                    f"{side}.floor": ((), "F32"),
                }
            )
    return found


def bytes_of_tensors(weights: list[Planned], tier: str) -> int:
    """Bytes of the numbers of all weights in this tier: what a process keeps in memory."""
    return sum(
        math.prod(shape) * BYTES[dtype]
        for weight in weights
        for shape, dtype in tensors_of(weight, tier).values()
    )


def bytes_of_file(
    weights: list[Planned],
    tier: str,
    *,
    estimator: str,
    anchor_rank: int | None = None,
    general_tokens: int = 0,
) -> int:
    """Bytes of the importance file: numbers, the header that names them and what the metadata say;
    `anchor_rank`: with the recorded adapter, `general_tokens`: of the text that is recorded on, by
    hashes of which the file knows it.
    """
    header: dict[str, object] = {}
    end = 0
    for weight in sorted(weights, key=lambda weight: weight.name):
        parts = tensors_of(weight, tier)
        if anchor_rank:
            parts = {
                **parts,
                ".anchor_A": ((anchor_rank, weight.shape[1]), "F32"),
                ".anchor_B": ((weight.shape[0], anchor_rank), "F32"),
            }
        for suffix, (shape, dtype) in parts.items():
            start, end = end, end + math.prod(shape) * BYTES[dtype]
            header[weight.name + suffix] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [start, end],
            }
    header["__metadata__"] = {
        "forgetless": json.dumps(
            _metadata(weights, tier, estimator, general_tokens), sort_keys=True
        )
    }
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def _metadata(
    weights: list[Planned], tier: str, estimator: str, general_tokens: int
) -> dict[str, object]:
    """As much as `record` says about where importance came from."""
    names = [weight.name for weight in weights]
    kind = parse_tier(tier)[0]
    shared = {weight.name: weight.leader for weight in weights if not weight.leads}
    cut = tier not in ("f32", "kronecker") and not (
        kind == "factored" and ESTIMATORS[estimator].tier == kind
    )
    return {
        "format": 1,
        "estimator": estimator,
        "unit": "nats per squared weight and so on, in words",
        "tier": tier,
        "norms": dict.fromkeys(names, ANY),
        **(
            {
                "energy_error": {
                    "against": "kronecker",
                    "weights": {name: [ANY, ANY] for name in names},
                }
            }
            if cut
            else {}
        ),
        **({"shared_in_cov": shared} if kind == "kronecker" and shared else {}),
        **(
            {"coded": {weight.name: [tier, *weight.shape] for weight in weights}}
            if kind in codec.BITS
            else {}
        ),
        "model": {"name": "owner/name-of-a-model", "revision": None, "fingerprint": HASH},
        "data": {} if ESTIMATORS[estimator].constant else _text_recorded_on(general_tokens),
        "settings": {"text": "x" * 500},
        "timings": {"train_seconds": ANY, "tokens_per_second": ANY},
        "versions": to_json(environment("cpu")),
    }


def _text_recorded_on(tokens: int) -> dict[str, object]:
    """As much as `record` says about a text of so many tokens."""
    traces = {name: "x" * length for name, length in planned_characters(tokens).items()}
    return {"source": "general-text.jsonl", "sha256": HASH, "traces": traces}


def pull_operations(weight: Planned, tier: str, *, rank: int, full: bool) -> float:
    """Floating-point operations of one pull on one weight, anchored at the base; see the module for
    the formulas.
    """
    kind, k = parse_tier(tier)
    out, into = weight.shape
    thin = 6 * rank**2 * (out + into)
    if kind == "factored":
        k = k or 1
        return 4.0 * k * out * into if full else k * (thin + 2.0 * rank * (out + into))
    if kind == "kronecker":
        sides = [
            2.0 * n * min(2 * k, n) if k else 2.0 * n * n for n in (out, into)
        ]  # of a product with one column
        return sides[0] * into + sides[1] * out if full else rank * sum(sides) + thin
    return 3.0 * out * into if full else (6.0 * rank + 1) * out * into


def shares(weights: list[Planned], tier: str, processes: int) -> list[list[Planned]]:
    """The weights whose importance each process keeps."""
    owner = owners(
        {weight.name: (weight.leader, bytes_of_tensors([weight], tier)) for weight in weights},
        processes,
    )
    return [
        [weight for weight in weights if owner[weight.name] == process]
        for process in range(processes)
    ]


def usual_tiers(estimator: str, cov_rank: int) -> list[str]:
    """The forms that importance of this estimator can have, the one that `record` writes first."""
    elementwise = ["f32", "bf16", "u8", "u4", "factored"]
    recorded = ESTIMATORS[estimator].tier
    if recorded == "kronecker":
        ranks = sorted({16, 64, cov_rank} - {0, cov_rank}, reverse=True)
        return [
            f"kronecker:{cov_rank}" if cov_rank else "kronecker",
            *([] if not cov_rank else ["kronecker"]),
            *(f"kronecker:{rank}" for rank in ranks),
            *elementwise,
        ]
    if recorded == "factored":
        return ["factored", "f32", "bf16", "u8", "u4"]
    return elementwise


def total(values: Mapping[str, float]) -> float:
    """Sum of named parts."""
    return sum(values.values())
