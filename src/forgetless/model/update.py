"""The update that a model carries, made smaller, and brought back: U -> factor * U.

    update = Update(model)           # before training: the base is what the weights are now
    ...train...
    update.keep()
    update.scale(0.5)                # half of what was kept; scale(1) is what was kept, bit for bit

Three kinds differ in what they touch, and each has `scale(factor)`:

    Update          the adapter's factors, or the target weights of full fine-tuning, and whatever
                    is trained beside them: what was trained is what is written, so a scaled model
                    can be saved. Costs a copy of it.
    AdapterUpdate   the factor that each LoRA layer multiplies its update by, to evaluate a finished
                    adapter: of any kind of layer, costs nothing, and rounds nothing, in half
                    precision either.
    ModelUpdate     all parameters of a model, on the way to another one. Costs two copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from forgetless.model.adapters import active_lora_layers
from forgetless.model.beside import beside
from forgetless.model.targets import adapter_types, target_weights
from forgetless.model.weights import FullWeight, LowRankWeight, wider


class Update:
    """The update of all target weights of one model, and of what is trained beside them.

    `names` chooses them for full fine-tuning, as in `target_weights`.
    """

    def __init__(self, model: nn.Module, *, names: str | None = None):
        self.weights = target_weights(model, names=names)
        self._beside = beside(model, self.weights)
        self.keep()

    @property
    def parameters(self) -> list[Tensor]:
        """What is scaled."""
        held = [parameter for weight in self.weights for parameter in weight.parameters]
        return [*held, *(moved.parameter for moved in self._beside)]

    def keep(self) -> None:
        """Take the update as it is now for the one to scale and to bring back."""
        self._kept = [
            tuple(parameter.detach().clone() for parameter in weight.parameters)
            for weight in self.weights
        ]
        self._beside = [
            replace(moved, trained=moved.parameter.detach().clone()) for moved in self._beside
        ]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Set every weight's update to `factor` times the kept one."""
        for moved in self._beside:
            moved.scale(factor)
        for weight, kept in zip(self.weights, self._kept, strict=True):
            if isinstance(weight, LowRankWeight):
                weight.A.copy_(kept[0])
                weight.B.copy_(kept[1] if factor == 1 else factor * kept[1])
            elif factor == 1:
                weight.W.copy_(kept[0])
            else:
                base = _base_of(weight)
                weight.W.copy_(base + factor * (kept[0].to(base) - base))

    @torch.no_grad()
    def randomise(self, size: float, seed: int = 0) -> None:
        """Set every weight's update to a random one whose elements have root mean square `size`.

        Its direction is the same at every call with this seed.
        """
        generator = torch.Generator().manual_seed(seed)
        for weight in self.weights:
            if isinstance(weight, LowRankWeight):
                A = weight.A.to(wider(weight.A.dtype))
                noise = torch.randn(weight.B.shape, generator=generator).to(A)
                elements = weight.shape[0] * weight.shape[1]
                mean_square = float((noise.T @ noise * (A @ A.T)).sum()) / elements  # of noise @ A
                weight.B.copy_(noise * (size / mean_square**0.5))
            else:
                base = _base_of(weight)
                noise = torch.randn(weight.W.shape, generator=generator).to(base)
                weight.W.copy_(base + size * noise)

    def thin_factors(self) -> Iterator[tuple[LowRankWeight, Tensor, Tensor]]:
        """Each weight with thin factors L (out, r), R (r, in) of its kept update L @ R.

        They are in f32 or wider. Raises ValueError for weights trained themselves.
        """
        for weight, kept in zip(self.weights, self._kept, strict=True):
            if isinstance(weight, FullWeight):
                raise ValueError(
                    f"'{weight.name}' is trained itself; only adapters can be re-factored"
                )
            dtype = wider(weight.A.dtype)
            yield weight, weight.scale * kept[1].to(dtype), kept[0].to(dtype)

    @torch.no_grad()
    def refactor(
        self, change: Callable[[LowRankWeight, Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        """Set every LoRA weight's update to `change(weight, L, R)`, made of the kept one.

        `change` returns thin factors (L', R') of the same rank. Raises ValueError for weights
        trained themselves.
        """
        for weight, L, R in self.thin_factors():
            new_L, new_R = change(weight, L, R)
            weight.A.copy_(new_R)
            weight.B.copy_(new_L / weight.scale)


class AdapterUpdate:
    """The update of a finished LoRA adapter, of any kind of layer, by its layers' own scale.

    Raises ValueError for other adapters.
    """

    def __init__(self, model: nn.Module):
        self._layers = [
            (layer, adapter, layer.scaling[adapter]) for layer, adapter in active_lora_layers(model)
        ]
        if not self._layers:
            raise ValueError(f"only LoRA updates can be scaled, found {adapter_types(model)}")

    def scale(self, factor: float) -> None:
        """Set the update to `factor` times the finished one."""
        for layer, adapter, finished in self._layers:
            layer.scaling[adapter] = finished * factor


class ModelUpdate:
    """The update from `model` to `tuned`, which has the same parameters; applied to `model`."""

    def __init__(self, model: nn.Module, tuned: nn.Module):
        ends = dict(tuned.named_parameters())
        self._parameters = []  # (parameter of the model, where it ends, its update)
        for name, parameter in model.named_parameters():
            end = ends[name].detach()
            self._parameters.append((parameter, end.clone(), end - parameter.detach()))

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Set every parameter to where it came from plus `factor` times its update.

        At 1 it is where it ends, bit for bit.
        """
        for parameter, end, U in self._parameters:
            parameter.copy_(end if factor == 1 else end - (1 - factor) * U)


def _base_of(weight: FullWeight) -> Tensor:
    """W(base) in the orientation of W, in f32 or wider."""
    return weight.oriented(weight.base_rows(slice(None)))
