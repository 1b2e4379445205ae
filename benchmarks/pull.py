"""One pull of one weight, and how its time grows.

The authors' formulation, a loss term done well, and the pull of every tier run side by side.

The authors' formulation builds the effective update densely in the graph and recomputes the norm of
the importance on the CPU in each step (our own code). The loss term done well builds the same graph
with norms cached. `three products alone` is what no element-wise pull can do without, in tiles as
the pull takes them: B A, P A^T, B^T P. The rest is `forgetless.Penalty.pull()` on a PEFT model,
hooks and checks included.

    python benchmarks/pull.py [--seconds 6]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import TIERS, alternate, append, in_tiers, row
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from forgetless.importance.importance import Importance
from forgetless.model.targets import target_weights
from forgetless.penalty import fused, tiled
from forgetless.penalty.pull import Penalty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "Llama-3.2-1B q_proj": (2048, 2048),
    "Llama-3.2-1B v_proj": (512, 2048),
    "Llama-3.2-1B down_proj": (2048, 8192),
    "Llama-3-8B q_proj": (4096, 4096),
    "Llama-3-8B v_proj": (1024, 4096),
    "Llama-3-8B down_proj": (4096, 14336),
}


class Blocks(nn.Module):
    """Linear layers and nothing else, as a base model for PEFT."""

    def __init__(self, shapes: list[tuple[int, int]]):
        super().__init__()
        self.embedding = nn.Embedding(2, 2)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(into, out, bias=False, device=DEVICE)})
            for out, into in shapes
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def adapted(shapes: list[tuple[int, int]], rank: int) -> nn.Module:
    """Layers with LoRA factors that have moved."""
    model = get_peft_model(
        Blocks(shapes), LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=["proj"])
    )
    for weight in target_weights(model):
        nn.init.normal_(weight.B, std=0.01)
    return model


def loss_term(
    model: nn.Module,
    importance: Importance,
    anchors: dict[str, Tensor],
    norms: dict[str, float] | None,
) -> None:
    """Gradients of the penalty as a loss term; without `norms` those are recomputed on the CPU."""
    weights = target_weights(model)
    found = norms or {w.name: float(importance[w.name].dense().cpu().norm()) for w in weights}
    c = torch.softmax(1e-8 * torch.tensor([found[w.name] for w in weights]), 0).tolist()
    total: Any = 0.0
    for coefficient, w in zip(c, weights, strict=True):
        D = w.scale * (w.B @ w.A) - anchors[w.name]
        total = total + coefficient * (importance[w.name].dense() * D**2).sum()
    (1e-3 * total).backward()


def products(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The three products of an element-wise pull, without importance: what is left of it is then a
    single pass.
    """
    pull_A, pull_B = torch.zeros_like(A), torch.empty_like(B)
    for rows in tiled.tiles(B.shape[0], A.shape[1], A.device):
        P = torch.mm(B[rows], A)
        torch.mm(P, A.T, out=pull_B[rows])
        pull_A.addmm_(B[rows].T, P)
    return pull_A, pull_B


def contenders(
    shapes: list[tuple[int, int]], rank: int, tiers: tuple[str, ...] = TIERS, losses: bool = True
) -> dict[str, Callable[[], Any]]:
    """Name -> a call that leaves one pull in the factors' gradients."""
    model = adapted(shapes, rank)
    weights = target_weights(model)
    stored = in_tiers({w.name: w.shape for w in weights}, DEVICE, tiers)
    calls: dict[str, Callable[[], Any]] = {}
    if losses:
        anchors = {w.name: torch.zeros(w.shape, device=DEVICE) for w in weights}
        norms = stored["f32"].norms()
        calls["authors' formulation"] = lambda: loss_term(model, stored["f32"], anchors, None)
        calls["loss term done well"] = lambda: loss_term(model, stored["f32"], anchors, norms)
        calls["three products alone"] = lambda: [
            products(w.A.detach(), w.B.detach()) for w in weights
        ]
    for tier, importance in stored.items():
        calls[tier] = Penalty(model, importance, strength=1e-3).pull
        if tier in fused.TIERS and fused.available(DEVICE)[0]:
            calls[f"{tier} fused"] = Penalty(model, importance, strength=1e-3, kernel="fused").pull
    return calls


def layers(seconds: float) -> None:
    """Every contender on single layers."""
    for shape, (out, into) in SHAPES.items():
        times = alternate(contenders([(out, into)], 8), seconds=seconds)
        first = "authors' formulation"
        append(
            [
                row(
                    "pull",
                    values,
                    shape=f"{shape} ({out}, {into})",
                    tier=name,
                    rank=8,
                    against=times[first],
                    baseline=first,
                )
                for name, values in times.items()
            ]
        )


def growth(seconds: float) -> None:
    """How one pull grows with width, rank and number of layers."""
    tiers = ("f32", "u8", "factored", "kronecker:16")
    for what, cases in (
        ("growth with width", [([(n, n)], 8) for n in (1024, 2048, 4096)]),
        ("growth with rank", [([(2048, 2048)], r) for r in (4, 16, 64)]),
        ("growth with layers", [([(1024, 1024)] * n, 8) for n in (1, 4, 16)]),
    ):
        for shapes, rank in cases:
            times = alternate(contenders(shapes, rank, tiers, losses=False), seconds=seconds)
            append(
                [
                    row(
                        what,
                        values,
                        shape=f"{len(shapes)} x {shapes[0]}",
                        tier=name,
                        rank=rank,
                        against=times["f32"],
                        baseline="f32",
                    )
                    for name, values in times.items()
                ]
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="per shape, about")
    parser.add_argument("--gpu", action="store_true", help="stop where there is no GPU")
    options = parser.parse_args()
    if options.gpu and DEVICE == "cpu":
        parser.error("--gpu: no GPU found; use make bench")
    layers(options.seconds)
    growth(options.seconds / 4)
