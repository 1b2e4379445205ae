"""Penalty: holds the weights of a model where importance says so, by a pull added to the gradients
right before each optimizer step.

    penalty = forgetless.Penalty(peft_model, importance, strength=1.0)
    with penalty.attach(optimizer):
        ...any training loop...

The pull comes after clipping, once per optimizer step, whatever the gradient accumulation. Strength
0 changes nothing, bit for bit, and allocates nothing. Song et al. 2025, arXiv 2501.13669; what we
do differently: no graph, no dense copy, norms of importance computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError, nearest
from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.fingerprint import fingerprint
from forgetless.model.optimizer_step import (
    before_step,
    pending_scale,
    unwrapped_optimizer,
    will_skip,
)
from forgetless.model.targets import base_shapes, target_weights
from forgetless.model.weights import FullWeight, TargetWeight, wider
from forgetless.penalty import factored, fused, kronecker, sharing, tiled
from forgetless.penalty.difference import thin
from forgetless.penalty.layers import Uniform
from forgetless.penalty.offload import in_cpu_memory, placed


class Penalty:
    """The penalty of one model.

    Args:
        model: a PEFT model with LoRA (rank, alpha and targets may differ from recording), or a bare
        model for full fine-tuning. importance: covers every target weight; a file with more weights
        than the model adapts is fine. strength: lambda; multiplies the energy. layers: layer
        coefficients (`forgetless.layers`); default Uniform(). anchor: "base" holds towards U = 0,
        "recorded" towards the adapter stored in the file. names: target weights for full
        fine-tuning. kernel: for element-wise importance, "tiled" (any device) or "fused", the
        Triton kernel for LoRA on a GPU: so far checked in Triton's interpreter
            only, so not the default.
        offload: keep importance in CPU memory (pinned where the model is on CUDA) and bring it to
        the device one weight at a time; see offload.py. shard: in several processes that train one
        model (DDP, FSDP2), each keeps the importance of its share of the weights, and `pull` is
        called together;
            see sharing.py. Without, each keeps all of it and DDP's processes pull alike. Nothing
            changes in one process.

    Raises ValueError when importance does not fit the model, OptionError for wrong settings.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Importance,
        *,
        strength: float,
        layers: Any = None,
        anchor: str = "base",
        names: str | None = None,
        kernel: str = "tiled",
        offload: bool = False,
        shard: bool = False,
    ):
        if kernel not in ("tiled", "fused"):
            raise OptionError(f"unknown kernel '{kernel}'; {nearest(kernel, ('tiled', 'fused'))}")
        if not (math.isfinite(strength) and strength >= 0):
            raise OptionError(f"strength must be finite and not negative, found {strength}")
        if anchor not in ("base", "recorded"):
            raise OptionError(f"unknown anchor '{anchor}'; {nearest(anchor, ('base', 'recorded'))}")
        self.importance, self.strength, self.anchor = importance, float(strength), anchor
        self.weights = target_weights(model, names=names)
        check_fit(model, importance, [weight.name for weight in self.weights], anchor)
        self.kernel = kernel
        if kernel == "fused":
            self._check_fused()
        self.offload, self.shard = offload, shard
        if offload:
            names_held = [weight.name for weight in self.weights]
            self.importance = in_cpu_memory(
                importance, names_held, any(weight.parameters[0].is_cuda for weight in self.weights)
            )
        self.coefficients: dict[str, float] = (layers or Uniform()).coefficients(
            importance.norms(), self.weights
        )
        self.pull_norm: float | None = (
            None  # of the last pull over all factors, before it was added
        )
        self.gradient_norm: float | None = None  # of the gradient it was added to
        self._last_energy: float | None = None
        self._entries: dict[str, Entry] = {}
        self._moved: dict[Any, Any] = {}  # covariances that weights share are moved once
        self._owner: dict[str, int] | None = (
            # weight -> the process that keeps its importance; None: not settled, or this one keeps
            # all
            None
        )
        self._sharded = self._settled = False

    def _check_fused(self) -> None:
        reasons = [
            why
            for device in {weight.parameters[0].device for weight in self.weights}
            for ok, why in [fused.available(device)]
            if not ok
        ]
        other = next(
            (
                weight
                for weight in self.weights
                if not isinstance(self.importance[weight.name], (DenseEntry, CodedEntry))
            ),
            None,
        )
        if other is not None:
            reasons.append(
                f"it is for element-wise tiers, '{other.name}' has tier "
                f"{self.importance[other.name].tier}"
            )
        if any(isinstance(weight, FullWeight) for weight in self.weights):
            reasons.append("it is for LoRA, found weights that are trained themselves")
        if reasons:
            raise OptionError(f"kernel 'fused' cannot be used: {'; '.join(reasons)}; use 'tiled'")

    @property
    def implementation(self) -> str:
        """Which algebra the pull uses, and why."""
        return implementation(self.importance)

    def attach(self, optimizer: Any) -> PenaltyAttachment:
        """Pull before every step of `optimizer`; returns a handle, also a context manager, whose
        `close()` removes the hook.
        """
        self._settled = False
        self.settle()
        return PenaltyAttachment(self, optimizer)

    def settle(self) -> None:
        """Take on what the model is by now: parameters that FSDP2 has put in place of others, and
        this process's share of the importance. `attach` calls it.

        Raises ValueError for what cannot be held under FSDP2.
        """
        if self._settled:
            return
        self.weights = [sharing.current(weight) for weight in self.weights]
        self._settled, sharded = (
            True,
            any(distributed.is_sharded(p) for weight in self.weights for p in weight.parameters),
        )
        if sharded and not self._sharded:
            for weight in self.weights:
                sharing.check_sharded(weight, self.importance[weight.name])
        full = isinstance(self.weights[0], FullWeight)
        if sharded and full and not self._sharded:
            rows = {weight.name: sharing.rows_here(weight) for weight in self.weights}
            self._keep(
                {name: sharing.rows_of(self.importance[name], here) for name, here in rows.items()},
                rows,
            )
        elif (
            self.shard and distributed.running() and self._owner is None and not (sharded and full)
        ):
            self._owner = sharing.owners(self.importance, [weight.name for weight in self.weights])
            self._keep(
                {
                    name: self.importance[name]
                    for name, owner in self._owner.items()
                    if owner == distributed.rank()
                }
            )
        self._sharded = sharded

    def _keep(self, entries: dict[str, Entry], rows: dict[str, slice] | None = None) -> None:
        self.importance = sharing.part(self.importance, entries, rows)
        self._entries, self._moved = {}, {}

    @torch.no_grad()
    def pull(self, *, scale: float = 1.0) -> None:
        """Add the pull to `.grad` now.

        `scale` multiplies it where gradients still carry a GradScaler's factor.
        """
        if self.strength == 0:
            return
        self.settle()
        energy, pulled, gradient = [], [], []
        for weight, parts, e in self._pulls():
            energy.append(e)
            for parameter, part in zip(weight.parameters, parts, strict=True):
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad, part = (
                    distributed.local(parameter.grad),
                    distributed.rows_like(part, parameter),
                )
                if not self._sharded or distributed.counts(parameter):
                    pulled.append(part.square().sum())
                    gradient.append(grad.to(part.dtype).square().sum() / scale**2)
                grad.add_(part, alpha=scale)
        self._last_energy, pulled_squared, gradient_squared = self._counted(
            _total(energy), _total(pulled), _total(gradient)
        )
        self.pull_norm, self.gradient_norm = math.sqrt(pulled_squared), math.sqrt(gradient_squared)
        if not math.isfinite(self.pull_norm):  # raised before the optimizer moves anything
            raise ValueError(
                f"the pull is {self.pull_norm} (energy {self._last_energy}); lower the strength "
                "or the learning rate"
            )

    def _pulls(self) -> Iterator[tuple[TargetWeight, tuple[Tensor, ...], Any]]:
        """(weight, pull per parameter, coefficient * energy where this process counts it) of every
        weight, together where importance is shared out.
        """
        waiting = []
        for weight, parts, e in self._parts(self.strength):
            if self._owner is None:
                yield weight, parts, e
            elif isinstance(weight, FullWeight):  # as large as the weight: one at a time
                yield (
                    weight,
                    tuple(distributed.from_owner(part, self._owner[weight.name]) for part in parts),
                    e,
                )
            else:
                waiting.append((weight, parts, e))
        distributed.add_up_all([part for _, parts, _ in waiting for part in parts])
        yield from waiting

    def _parts(
        self, strength: float, *, alike: bool = False
    ) -> Iterator[tuple[TargetWeight, tuple[Tensor, ...], Any]]:
        """What this process has of each pull and energy: zeros for a weight whose importance
        another keeps.
        """
        entries = self._placed()
        for weight in self.weights:
            here = sharing.seen(weight)
            if self._owner is not None and self._owner[weight.name] != distributed.rank():
                yield (
                    weight,
                    tuple(torch.zeros_like(p, dtype=wider(p.dtype)) for p in here.parameters),
                    0.0,
                )
                continue
            c = self.coefficients[weight.name]
            parts, e = self._pull_of(here, next(entries), strength * c)
            counted = (
                not self._sharded
                or self._owner is not None
                or (
                    distributed.counts(weight.W)
                    if isinstance(weight, FullWeight)
                    else distributed.first()
                )
            )
            yield weight, parts, (e if alike else c * e) if counted else 0.0

    def _counted(self, *numbers: float) -> list[float]:
        """Sums over the processes: of energies where importance is shared out, of norms where
        parameters are.
        """
        device = self.weights[0].parameters[0].device
        if self._sharded:
            return distributed.add_up_numbers(numbers, device)
        return (
            [*distributed.add_up_numbers(numbers[:1], device), *numbers[1:]]
            if self._owner is not None
            else list(numbers)
        )

    @torch.no_grad()
    def energy(self, *, together: bool = False, alike: bool = False) -> float:
        """sum_l c_l * energy_l at the weights as they are now, in nats for importance in nats per
        squared weight; `alike`: sum_l energy_l.

        Where processes share the importance or the parameters, it is that of the last pull, so that
        one process may ask alone; `together`, every process asking, it is that of the weights as
        they are now. Raises ValueError before the first pull.
        """
        if not together and (self._owner is not None or self._sharded):
            if self._last_energy is None:
                raise ValueError(
                    "no pull was made yet, and importance is shared over processes: let every "
                    "process call energy(together=True)"
                )
            return self._last_energy
        self.settle()
        return self._counted(_total([e for _, _, e in self._parts(0.0, alike=alike)]))[0]

    def value(self) -> float:
        """strength * energy(): what the paper adds to the loss."""
        return self.strength * self.energy()

    def logs(self) -> dict[str, float]:
        """Energy, pull norm and pull/gradient ratio of the last step, for a training log; empty
        before the first.
        """
        if self._last_energy is None or self.pull_norm is None or self.gradient_norm is None:
            return {}
        ratio = self.pull_norm / self.gradient_norm if self.gradient_norm > 0 else 0.0
        return {"energy": self._last_energy, "pull_norm": self.pull_norm, "pull_ratio": ratio}

    def _pull_of(
        self, weight: TargetWeight, entry: Entry, k: float
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """(pull per parameter, energy without coefficient) of one weight, in f32 or wider."""
        dtype, device = wider(weight.parameters[0].dtype), weight.parameters[0].device
        anchor = self._anchor_of(weight, device, dtype)
        if isinstance(weight, FullWeight):
            part, energy = _full_pull(weight, entry, anchor, k)
            return (weight.oriented(part),), energy
        A, B = weight.A.detach(), weight.B.detach()
        initial = (
            None
            if weight.initial is None
            else (weight.initial[0].to(device, dtype), weight.initial[1].to(device, dtype))
        )
        if self.kernel == "fused":
            assert isinstance(entry, (DenseEntry, CodedEntry))
            values, scale = (
                (entry.codes, entry.scale)
                if isinstance(entry, CodedEntry)
                else (entry.values, None)
            )
            pull_A, pull_B, energy = fused.pull(
                A,
                B,
                weight.scale,
                values,
                scale,
                entry.tier,
                _together(weight.scale, initial, anchor),
                k,
            )
            return (pull_A, pull_B), energy
        A, B = A.to(dtype), B.to(dtype)
        pull_A, pull_B, energy = low_rank_pull(
            A, B, weight.scale, entry, *thin(A, B, weight.scale, initial, anchor), k
        )
        return (pull_A, pull_B), energy

    def _placed(self) -> Iterator[Entry]:
        """The entries kept here, each where its weight is: element-wise ones as stored, thin
        factors and covariances in the dtype of the algebra.
        """
        kept = [
            weight
            for weight in self.weights
            if self._owner is None or self._owner[weight.name] == distributed.rank()
        ]
        places = [
            (weight.parameters[0].device, wider(weight.parameters[0].dtype)) for weight in kept
        ]
        if self.offload:
            yield from placed(
                (self.importance[weight.name], *place)
                for weight, place in zip(kept, places, strict=True)
            )
            return
        for weight, place in zip(kept, places, strict=True):
            if weight.name not in self._entries:  # brought there once
                self._entries[weight.name] = self.importance[weight.name].to(*place, self._moved)
            yield self._entries[weight.name]

    def _anchor_of(
        self, weight: TargetWeight, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """(A*, B*), (r, in) and (out, r), or None: held towards the base."""
        if self.anchor == "base":
            return None
        A, B = self.importance.anchors[weight.name]
        return A.to(device, dtype), B.to(device, dtype)


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


def _full_pull(
    weight: FullWeight, entry: Entry, anchor: tuple[Tensor, Tensor] | None, k: float
) -> tuple[Tensor, Tensor]:
    """(pull on W as (out, in), energy) for full fine-tuning, by the algebra that fits the entry."""
    rows = lambda part: _movement(weight, part, anchor)
    if isinstance(entry, FactoredEntry):
        return factored.full_pull(rows(slice(None)), entry, k)
    if isinstance(entry, KroneckerEntry):
        return kronecker.full_pull(rows(slice(None)), entry, k)
    assert isinstance(entry, (DenseEntry, CodedEntry))
    part = torch.empty(weight.shape, dtype=wider(weight.W.dtype), device=weight.W.device)
    return part, tiled.full_pull(rows, entry.rows, part, k)


def _together(
    scale: float, initial: tuple[Tensor, Tensor] | None, anchor: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    """(A0, B0) with B0 @ A0 what s B A is held towards: where the adapter started and the recorded
    adapter, side by side.
    """
    pairs = ([] if initial is None else [(initial[0], scale * initial[1])]) + (
        [] if anchor is None else [anchor]
    )
    return (
        (torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1)) if pairs else None
    )


def _movement(weight: FullWeight, rows: slice, anchor: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows of W - W(base) - U*, (rows, in), in f32 or wider."""
    D = weight.moved(rows)
    return D if anchor is None else D.addmm_(anchor[1][rows], anchor[0], alpha=-1)


class PenaltyAttachment:
    """The penalty's hook on one optimizer; `close()` or leaving the `with` block removes it."""

    def __init__(self, penalty: Penalty, optimizer: Any):
        self.penalty = penalty
        self.optimizer = unwrapped_optimizer(optimizer)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad for weight in penalty.weights for p in weight.parameters):
            raise ValueError(
                "every target weight is frozen, so there is nothing to hold; unfreeze the "
                "adapter (for PEFT: is_trainable=True)"
            )
        for weight in penalty.weights:
            if any(p.requires_grad and id(p) not in known for p in weight.parameters):
                raise ValueError(
                    f"'{weight.name}' is not among this optimizer's parameters; attach the "
                    "penalty to the optimizer that trains it, or, "
                    "where that one steps copies, call penalty.pull() before the gradients are "
                    "copied"
                )
        self._handle: Any = before_step(self.optimizer, self._pull)

    def __enter__(self) -> Penalty:
        return self.penalty

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _pull(self) -> None:
        """The pull, unless a GradScaler is about to skip the step; scaled where a fused optimizer
        has yet to unscale the gradients.
        """
        if not will_skip(self.optimizer):
            self.penalty.pull(scale=pending_scale(self.optimizer))


def _total(parts: list[Any]) -> float:
    """Sum of scalars that may live on several devices."""
    return sum((float(part) for part in parts), 0.0)


def check_fit(
    model: nn.Module, importance: Importance, targets: Sequence[str], anchor: str
) -> None:
    """Raise ValueError unless `importance` was recorded on this base model and covers every target
    weight (and has its anchors where needed).
    """
    source = importance.info.get("path", "the importance")
    shapes = base_shapes(model)
    wrong = [
        name for name in importance if name in shapes and importance[name].shape != shapes[name]
    ]
    recorded_on = importance.info.get("model", {}).get("name")
    advice = (
        f"It was recorded on {recorded_on}; record again on this model."
        if recorded_on
        else "Record again on this model."
    )
    if wrong:
        first, more = wrong[0], f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{source} does not fit the model: '{first}' is {importance[first].shape} in the "
            f"file and {shapes[first]} in the model{more}. {advice}"
        )
    missing = [name for name in targets if name not in importance]
    if missing:
        raise ValueError(
            f"{source} does not cover {len(missing)} of {len(targets)} target weights, first "
            f"'{missing[0]}'; "
            f"it holds {len(importance)} weights. Record with these targets, or tune fewer. "
            f"{advice}"
        )
    expected, found = importance.info.get("model", {}).get("fingerprint"), fingerprint(model)
    if expected and expected != found:
        raise ValueError(
            f"{source} was recorded on another base model: fingerprint {expected[:12]} in the "
            f"file, {found[:12]} here. {advice}"
        )
    if anchor == "recorded":
        bare = [name for name in targets if name not in importance.anchors]
        if bare:
            raise ValueError(
                f"{source} has no recorded adapter for '{bare[0]}'; use anchor 'base', or record "
                "with --keep-anchor"
            )
