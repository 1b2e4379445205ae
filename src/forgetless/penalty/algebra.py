"""Which algebra computes the pull of a weight: it follows from the form of its importance.

    f32, bf16, u8, u4     tiled.py       element by element, a few rows at a time
    factored              factored.py    rows and columns of importance times thin factors
    kronecker             kronecker.py   covariances times thin factors

On request the element-wise forms under LoRA go to the Triton kernel of fused.py. A weight that is
trained itself has no thin factors; the same files have a `full_pull` for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forgetless.errors import OptionError
from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)
from forgetless.importance.importance import Importance
from forgetless.model.weights import FullWeight, LowRankWeight, TargetWeight, wider
from forgetless.penalty import factored, fused, kronecker, tiled
from forgetless.penalty.difference import thin

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r)

IMPLEMENTATIONS: dict[type, str] = {
    DenseEntry: "tiled pull (element by element, a few rows at a time)",
    CodedEntry: "tiled pull (element by element, decoding a few rows at a time)",
    FactoredEntry: "factored pull (rows and columns of importance on the update's own factors)",
    KroneckerEntry: "kronecker pull (covariances times the update's own factors)",
}


def implementation(importance: Importance) -> str:
    """Which pull this importance gets, and why, for people."""
    kinds = sorted({IMPLEMENTATIONS[type(entry)] for entry in importance.entries.values()})
    return f"{' and '.join(kinds)} for tier {importance.tier}"


def check_fused(weights: Sequence[TargetWeight], importance: Importance) -> None:
    """Raise OptionError, with every reason, where the Triton kernel cannot compute the pull."""
    reasons = []
    for device in {weight.parameters[0].device for weight in weights}:
        usable, why = fused.available(device)
        if not usable:
            reasons.append(why)
    for weight in weights:
        entry = importance[weight.name]
        if not isinstance(entry, (DenseEntry, CodedEntry)):
            reasons.append(f"it is for element-wise tiers, '{weight.name}' has tier {entry.tier}")
            break
    if any(isinstance(weight, FullWeight) for weight in weights):
        reasons.append("it is for LoRA, found weights that are trained themselves")
    if reasons:
        raise OptionError(f"kernel 'fused' cannot be used: {'; '.join(reasons)}; use 'tiled'")


def pull_of(
    weight: TargetWeight, entry: Entry, anchor: Factors | None, k: float, *, kernel: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(pull for each of the weight's parameters, energy), in f32 or wider.

    k = strength * c_l multiplies the pull; the energy is without it. `entry` and `anchor` are where
    the weight is.
    """
    if isinstance(weight, FullWeight):
        part, energy = _full_pull(weight, entry, anchor, k)
        return (weight.oriented(part),), energy
    initial = _initial_of(weight)
    A, B = weight.A.detach(), weight.B.detach()
    if kernel == "fused":
        pull_A, pull_B, energy = _fused_pull(A, B, weight.scale, entry, initial, anchor, k)
        return (pull_A, pull_B), energy
    dtype = wider(A.dtype)
    A, B = A.to(dtype), B.to(dtype)
    L, R = thin(A, B, weight.scale, initial, anchor)
    pull_A, pull_B, energy = low_rank_pull(A, B, weight.scale, entry, L, R, k)
    return (pull_A, pull_B), energy


def low_rank_pull(
    A: Tensor, B: Tensor, scale: float, entry: Entry, L: Tensor, R: Tensor, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A, pull on B, energy) for D = L @ R, by the algebra that fits the entry."""
    if isinstance(entry, FactoredEntry):
        return factored.pull(A, B, scale, entry, L, R, k)
    if isinstance(entry, KroneckerEntry):
        return kronecker.pull(A, B, scale, entry, L, R, k)
    assert isinstance(entry, (DenseEntry, CodedEntry))
    return tiled.pull(A, B, scale, entry.rows, L, R, k)


def _fused_pull(
    A: Tensor,
    B: Tensor,
    scale: float,
    entry: Entry,
    initial: Factors | None,
    anchor: Factors | None,
    k: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pull on A, pull on B, energy) by the Triton kernel."""
    held_towards = _side_by_side(scale, initial, anchor)
    if isinstance(entry, CodedEntry):
        return fused.pull(A, B, scale, entry.codes, entry.scale, entry.tier, held_towards, k)
    assert isinstance(entry, DenseEntry)
    return fused.pull(A, B, scale, entry.values, None, entry.tier, held_towards, k)


def _full_pull(
    weight: FullWeight, entry: Entry, anchor: Factors | None, k: float
) -> tuple[Tensor, Tensor]:
    """(pull on W as (out, in), energy) for full fine-tuning, by the algebra that fits the entry."""

    def difference(rows: slice) -> Tensor:  # (rows, in) of W - W(base) - U*
        D = weight.moved(rows)
        return D if anchor is None else D.addmm_(anchor[1][rows], anchor[0], alpha=-1)

    if isinstance(entry, FactoredEntry):
        return factored.full_pull(difference(slice(None)), entry, k)
    if isinstance(entry, KroneckerEntry):
        return kronecker.full_pull(difference(slice(None)), entry, k)
    assert isinstance(entry, (DenseEntry, CodedEntry))
    part = torch.empty(weight.shape, dtype=wider(weight.W.dtype), device=weight.W.device)
    energy = tiled.full_pull(difference, entry.rows, part, k)
    return part, energy


def _initial_of(weight: LowRankWeight) -> Factors | None:
    """(A0, B0) that the adapter started from, where the weight is, in the dtype of the algebra."""
    if weight.initial is None:
        return None
    device, dtype = weight.A.device, wider(weight.A.dtype)
    A0, B0 = weight.initial
    return A0.to(device, dtype), B0.to(device, dtype)


def _side_by_side(scale: float, initial: Factors | None, anchor: Factors | None) -> Factors | None:
    """(A0, B0) whose product B0 @ A0 is what s B A is held towards.

    It has the factors that the adapter started from and those of the recorded adapter side by side.
    """
    pairs: list[Factors] = []
    if initial is not None:
        pairs.append((initial[0], scale * initial[1]))
    if anchor is not None:
        pairs.append(anchor)
    if not pairs:
        return None
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1)
