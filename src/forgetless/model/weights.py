"""The two kinds of target weight, and their effective update U = W - W(base), always (out, in).

    LowRankWeight     under a LoRA adapter: U = scale * B @ A
    FullWeight        trained itself: U is the difference to the base, which is read from its
                      checkpoint (checkpoint.py) or from a copy

Everything outside this room works with these two, and knows nothing of PEFT's inner names.

    for weight in target_weights(peft_model):
        weight.name            # 'model.layers.0.self_attn.q_proj.weight', whatever wraps the model
        weight.update()        # (out, in), accumulated in at least f32

A quantised base needs nothing special: only the factors are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model.checkpoint import BaseWeight
from forgetless.model.linear import LinearModule

# Elements of the base that are in memory at a time: 16 MiB in f32.
BASE_ROWS = 1 << 22


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that forgetless accumulates in: f32, or f64 for f64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class LowRankWeight:
    """A base weight with one active LoRA adapter: U = scale * (B @ A - B0 @ A0).

    There is an initial product B0 @ A0 only where the adapter starts away from the base.
    """

    name: str
    shape: tuple[int, int]  # (out, in)
    layer: int | None
    kind: str
    module: Any  # PEFT's layer
    A: nn.Parameter  # (r, in)
    B: nn.Parameter  # (out, r)
    scale: float
    initial: tuple[Tensor, Tensor] | None = None  # (r, in), (out, r)
    adapter: str = "default"

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.A, self.B)

    def base_layer(self) -> Any:
        """The linear layer of the base model, inside PEFT's."""
        return self.module.get_base_layer()

    def live(self) -> LowRankWeight:
        """The same with the parameters that the module has now; FSDP2 puts others in place."""
        A = self.module.lora_A[self.adapter].weight
        B = self.module.lora_B[self.adapter].weight
        return self if A is self.A and B is self.B else replace(self, A=A, B=B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """L (out, q), R (q, in) with L @ R = U, in f32 or wider."""
        dtype = wider(self.A.dtype)
        A = self.A.detach().to(dtype)
        B = self.B.detach().to(dtype) * self.scale
        if self.initial is None:
            return B, A
        A0 = self.initial[0].to(A)
        B0 = self.initial[1].to(A) * self.scale
        return torch.cat([B - B0, B0], 1), torch.cat([A, A - A0], 0)

    def update(self) -> Tensor:
        """U, (out, in), in f32 or wider."""
        dtype = wider(self.A.dtype)
        product = self.B.detach().to(dtype) @ self.A.detach().to(dtype)
        if self.initial is not None:
            product -= self.initial[1].to(product) @ self.initial[0].to(product)
        return product.mul_(self.scale)


@dataclass(frozen=True, eq=False)
class FullWeight:
    """A base weight that is trained itself: U = W - base.

    `base` is what W was when the target was made: in the checkpoint's file, or a copy in memory.
    """

    name: str
    shape: tuple[int, int]  # (out, in)
    layer: int | None
    kind: str
    module: LinearModule
    W: nn.Parameter  # (out, in), or (in, out) where transposed
    base: BaseWeight  # as W
    transposed: bool

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.W,)

    def live(self) -> FullWeight:
        """The same with the parameter that the module has now; FSDP2 puts another in place."""
        return self if self.module.weight is self.W else replace(self, W=self.module.weight)

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the parameter, seen as (out, in)."""
        return tensor.T if self.transposed else tensor

    def base_rows(self, rows: slice) -> Tensor:
        """Rows of W(base), (rows, in), in f32 or wider, where W is.

        They are rounded to W's dtype, as loading rounded them.
        """
        part = (slice(None), rows) if self.transposed else (rows, slice(None))
        loaded = self.base.read(part).to(self.W.dtype).to(self.W.device)
        return self.oriented(loaded).to(wider(self.W.dtype))

    def update(self) -> Tensor:
        """U, (out, in), in f32 or wider."""
        return self.moved(slice(None))

    def moved(self, rows: slice) -> Tensor:
        """Rows of U, (rows, in), in f32 or wider.

        However many are asked for, the base is in memory a few at a time.
        """
        U = self.oriented(self.W.detach())[rows].to(wider(self.W.dtype), copy=True)
        first, last, _ = rows.indices(self.shape[0])
        some = max(1, BASE_ROWS // max(self.shape[1], 1))
        for start in range(first, last, some):
            end = min(start + some, last)
            U[start - first : end - first] -= self.base_rows(slice(start, end))
        return U


TargetWeight = LowRankWeight | FullWeight
