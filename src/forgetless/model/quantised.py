"""4-bit layers of bitsandbytes on a CPU: kept in the form that has a backward pass.

    keep_differentiable(model)      # before anything is evaluated

On a CPU with AVX512-BF16, bitsandbytes 0.50 packs the weights of a layer for inference the first
time that it is evaluated, for good. What is packed has no backward pass: from then on nothing flows
back through the base, without an error (bitsandbytes-foundation/bitsandbytes#1804), and a training
that measures its base first has wrong gradients. Each layer holds the flag that allows it; here it
is taken away.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# What a 4-bit layer has where it may be packed, and what the state of a packed weight says.
MAY_PACK = "support_avx512bf16_for_cpu"
PACKED = "packing_format_for_cpu"


def keep_differentiable(model: nn.Module) -> None:
    """Let no 4-bit layer of `model` be packed for inference, in place; nothing to do elsewhere.

    Raises ValueError where one is packed already: packing rounds, so that it cannot be undone.
    """
    layers: Any = model.named_modules()
    for path, module in layers:
        if type(module).__name__ != "Linear4bit":
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, PACKED, False):
            raise ValueError(
                f"the 4-bit weights of '{path}' are packed for inference, since the model was "
                "evaluated on this CPU, and no gradient flows through them; load the model again, "
                "and hand it over before it is evaluated"
            )
        if hasattr(module, MAY_PACK):
            setattr(module, MAY_PACK, False)
