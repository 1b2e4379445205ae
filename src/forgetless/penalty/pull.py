"""The penalty: it holds the weights of a model where importance says so.

It acts as a pull, which is added to the gradients right before each optimizer step.

    penalty = forgetless.Penalty(peft_model, importance, strength=1.0)
    with penalty.attach(optimizer):
        ...any training loop...

With U the update of a target weight, U* its anchor and c_l its layer coefficient,

    energy = sum_l c_l * sum_ij Omega_ij (U_ij - U*_ij)^2
    pull   = gradient of strength * energy

The pull comes after clipping, once in each optimizer step, whatever the gradient accumulation is.
Strength 0 changes nothing, bit for bit, and allocates nothing.

This file reads from the top down: `pull` adds up the parts that each weight contributes, and the
parts come from the algebra that fits the importance (algebra.py). What several processes do
together stands in sharing.py.

Source: Song et al. 2025, arXiv 2501.13669. What we do differently: no graph is built, nothing dense
is kept between steps, and the norms of importance are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError, nearest
from forgetless.importance.entries import Entry
from forgetless.importance.importance import Importance
from forgetless.model import shards
from forgetless.model.quantised import keep_differentiable
from forgetless.model.targets import target_weights
from forgetless.model.weights import TargetWeight, wider
from forgetless.penalty import algebra, sharing
from forgetless.penalty.attachment import PenaltyAttachment
from forgetless.penalty.fit import check_fit, say_what_is_not_held
from forgetless.penalty.layers import LayerRule, Uniform
from forgetless.penalty.offload import in_cpu_memory, placed
from forgetless.penalty.sharing import PullOfWeight, Sharding

KERNELS = ("tiled", "fused")
ANCHORS = ("base", "recorded")


class Penalty:
    """The penalty of one model.

    Args:
        model: a PEFT model with LoRA, whose rank, alpha and targets may differ from those of the
            recording, or a bare model for full fine-tuning.
        importance: it must cover every target weight; more weights than the model adapts are fine.
        strength: lambda, which multiplies the energy.
        layers: the layer coefficients (`forgetless.layers`); default `Uniform()`.
        anchor: "base" holds towards U = 0, "recorded" towards the adapter stored in the file.
        names: the target weights for full fine-tuning.
        kernel: for element-wise importance: "tiled" runs on any device; "fused" is the Triton
            kernel for LoRA on a GPU, which has so far been checked in Triton's interpreter only,
            and is therefore not the default.
        offload: keep importance in CPU memory, pinned where the model is on CUDA, and bring it to
            the device one weight at a time (offload.py).
        shard: in several processes that train one model (DDP, FSDP2), each keeps the importance of
            its shard of the weights, and `pull` is called together (sharing.py). Without it each
            process keeps all of the importance, and DDP's processes pull alike. In one process it
            changes nothing.

    Raises ValueError when importance does not fit the model, OptionError for wrong settings.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Importance,
        *,
        strength: float,
        layers: LayerRule | None = None,
        anchor: str = "base",
        names: str | None = None,
        kernel: str = "tiled",
        offload: bool = False,
        shard: bool = False,
    ):
        _check_settings(strength, anchor, kernel)
        self.importance = importance
        self.strength = float(strength)
        self.anchor = anchor
        self.kernel = kernel
        self.offload = offload
        self.shard = shard
        keep_differentiable(model)
        self.weights = target_weights(model, names=names)
        targets = [weight.name for weight in self.weights]
        check_fit(model, importance, targets, anchor)
        say_what_is_not_held(model, self.weights)
        if kernel == "fused":
            algebra.check_fused(self.weights, importance)
        if offload:
            on_gpu = any(weight.parameters[0].is_cuda for weight in self.weights)
            self.importance = in_cpu_memory(importance, targets, on_gpu)
        self.rule: LayerRule = layers or Uniform()
        self.coefficients: dict[str, float] = self.rule.coefficients(
            importance.norms(), self.weights
        )

        # Of the last pull over all parameters, and of the gradient that it was added to.
        self.pull_norm: float | None = None
        self.gradient_norm: float | None = None
        self._last_energy: float | None = None

        # Entries that have been brought to their weight's device. Covariances that weights share
        # are brought there once.
        self._entries: dict[str, Entry] = {}
        self._moved: dict[Any, Any] = {}
        self._sharding = Sharding()
        self._settled = False

    @property
    def implementation(self) -> str:
        """Which algebra the pull uses, and why."""
        return algebra.implementation(self.importance)

    def attach(self, optimizer: Any) -> PenaltyAttachment[Penalty]:
        """Pull before every step of `optimizer`.

        Returns a handle, also a context manager, whose `close()` removes the hook.
        """
        self._settled = False
        self.settle()
        return PenaltyAttachment(self, optimizer)

    def settle(self) -> None:
        """Take on what the model is by now; `attach` calls it.

        These are the parameters that FSDP2 has put in place of others, and this process's shard of
        the importance. Raises ValueError for what cannot be held under FSDP2.
        """
        if self._settled:
            return
        self._settled = True
        self.weights = [sharing.current(weight) for weight in self.weights]
        self._sharding, importance = sharing.settled(
            self._sharding, self.weights, self.importance, shard=self.shard
        )
        if importance is not self.importance:
            self.importance = importance
            self._entries = {}
            self._moved = {}

    @torch.no_grad()
    def pull(self, *, scale: float = 1.0) -> None:
        """Add the pull to `.grad` now.

        `scale` multiplies it where gradients still carry a GradScaler's factor. Raises ValueError
        where the pull is not finite.
        """
        if self.strength == 0:
            return
        self.settle()
        energies: list[Tensor | float] = []
        pulled: list[Tensor | float] = []
        gradients: list[Tensor | float] = []
        for weight, parts, energy in self._sharding.together(self._parts(self.strength)):
            energies.append(energy)
            for parameter, part in zip(weight.parameters, parts, strict=True):
                if parameter.requires_grad:
                    pull_squared, gradient_squared = self._add(parameter, part, scale)
                    pulled.append(pull_squared)
                    gradients.append(gradient_squared)
        self._note(_total(energies), _total(pulled), _total(gradients))

    def _add(
        self, parameter: nn.Parameter, part: Tensor, scale: float
    ) -> tuple[Tensor | float, Tensor | float]:
        """Add one parameter's pull to its gradient.

        Returns the squared norms of the pull and of the gradient before it, zero where another
        process counts them.
        """
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = shards.local(parameter.grad)
        part = shards.rows_like(part, parameter)
        squares: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)
        if self._sharding.counts_norms(parameter):
            squares = (part.square().sum(), grad.to(part.dtype).square().sum() / scale**2)
        grad.add_(part, alpha=scale)
        return squares

    def _note(self, energy: float, pull_squared: float, gradient_squared: float) -> None:
        """Keep the numbers of a pull; raise ValueError before the optimizer moves by a bad one."""
        self._last_energy, pull_squared, gradient_squared = self._sharding.sums(
            self._device(), energy, pull_squared, gradient_squared
        )
        self.pull_norm = math.sqrt(pull_squared)
        self.gradient_norm = math.sqrt(gradient_squared)
        if not math.isfinite(self.pull_norm):
            raise ValueError(
                f"the pull is {self.pull_norm} (energy {self._last_energy}); lower the strength "
                "or the learning rate"
            )

    def _parts(self, strength: float, *, alike: bool = False) -> Iterator[PullOfWeight]:
        """What this process has of each weight's pull and energy.

        A weight whose importance another process keeps has zeros. The energy is multiplied by the
        layer coefficient, or not where `alike`.
        """
        entries = self._placed()
        for weight in self.weights:
            here = sharing.seen(weight)
            if not self._sharding.keeps(weight.name):
                yield PullOfWeight(weight, sharing.no_pull(here), 0.0)
                continue
            coefficient = self.coefficients[weight.name]
            parts, energy = algebra.pull_of(
                here,
                next(entries),
                self._anchor_of(here),
                strength * coefficient,
                kernel=self.kernel,
            )
            if not self._sharding.counts_energy(weight):
                yield PullOfWeight(weight, parts, 0.0)
            else:
                yield PullOfWeight(weight, parts, energy if alike else coefficient * energy)

    def _placed(self) -> Iterator[Entry]:
        """The entries kept here, each where its weight is.

        Element-wise ones come as stored, thin factors and covariances in the dtype of the algebra.
        """
        weights = [weight for weight in self.weights if self._sharding.keeps(weight.name)]
        places = [_place_of(weight) for weight in weights]
        if self.offload:
            yield from placed(
                (self.importance[weight.name], *place)
                for weight, place in zip(weights, places, strict=True)
            )
            return
        for weight, place in zip(weights, places, strict=True):
            if weight.name not in self._entries:
                self._entries[weight.name] = self.importance[weight.name].to(*place, self._moved)
            yield self._entries[weight.name]

    def _anchor_of(self, weight: TargetWeight) -> tuple[Tensor, Tensor] | None:
        """(A*, B*), (r, in) and (out, r), where the weight is; None: held towards the base."""
        if self.anchor == "base":
            return None
        device, dtype = _place_of(weight)
        A, B = self.importance.anchors[weight.name]
        return A.to(device, dtype), B.to(device, dtype)

    def _device(self) -> torch.device:
        """Where the first weight is."""
        return self.weights[0].parameters[0].device

    @torch.no_grad()
    def energy(self, *, together: bool = False, alike: bool = False) -> float:
        """sum_l c_l * energy_l at the weights as they are now; `alike`: sum_l energy_l.

        The unit is nats for importance in nats per squared weight. Where processes share the
        importance or the parameters, it is the energy of the last pull, so that one process may ask
        alone; `together`, every process asking, it is that of the weights as they are now. Raises
        ValueError where it is that of the last pull, and there was none.
        """
        if not together and self._sharding.spread:
            if self._last_energy is None:
                raise ValueError(
                    "no pull was made yet, and importance is shared over processes: let every "
                    "process call energy(together=True)"
                )
            return self._last_energy
        self.settle()
        energies = [energy for _, _, energy in self._parts(0.0, alike=alike)]
        return self._sharding.sums(self._device(), _total(energies))[0]

    def value(self) -> float:
        """strength * energy(): what the paper adds to the loss."""
        return self.strength * self.energy()

    def logs(self) -> dict[str, float]:
        """Numbers of the last step for a training log; empty before the first.

        These are the energy, the norm of the pull, and its ratio to the norm of the gradient.
        """
        if self._last_energy is None or self.pull_norm is None or self.gradient_norm is None:
            return {}
        ratio = self.pull_norm / self.gradient_norm if self.gradient_norm > 0 else 0.0
        return {"energy": self._last_energy, "pull_norm": self.pull_norm, "pull_ratio": ratio}


def _check_settings(strength: float, anchor: str, kernel: str) -> None:
    """Raise OptionError for settings that no penalty has."""
    if kernel not in KERNELS:
        raise OptionError(f"unknown kernel '{kernel}'; {nearest(kernel, KERNELS)}")
    if not (math.isfinite(strength) and strength >= 0):
        raise OptionError(f"strength must be finite and not negative, found {strength}")
    if anchor not in ANCHORS:
        raise OptionError(f"unknown anchor '{anchor}'; {nearest(anchor, ANCHORS)}")


def _place_of(weight: TargetWeight) -> tuple[torch.device, torch.dtype]:
    """The device of a weight, and the dtype of its algebra."""
    parameter = weight.parameters[0]
    return parameter.device, wider(parameter.dtype)


def _total(parts: list[Tensor | float]) -> float:
    """Sum of scalars that may live on several devices."""
    return sum((float(part) for part in parts), 0.0)
