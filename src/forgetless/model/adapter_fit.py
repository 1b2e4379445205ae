"""Whether an adapter belongs to a base model, looked up before either is loaded.

    check_adapter_fits(options, folder)      # FileError: ... was trained on another model

The base is built without weights, from its configuration alone, and the factors in the adapter's
file must have the sizes of the layers that they name. Two bases of the same sizes, as a model and
its chat version, are told apart by no size; what an adapter says of its base is then only logged.
"""

from __future__ import annotations

import logging
from pathlib import Path

from forgetless.errors import FileError
from forgetless.model.adapter_files import PEFT_PREFIX, adapter_shapes, checked_adapter
from forgetless.model.linear import base_shapes
from forgetless.model.loading import load_empty
from forgetless.options.model import ModelOptions

logger = logging.getLogger("forgetless")
# How PEFT ends the names of LoRA's factors, with the side of the layer's weight (out, in) and the
# side of the factor that are equal.
FACTORS = {".lora_A.weight": (1, 1), ".lora_B.weight": (0, 0)}


def check_adapter_fits(options: ModelOptions, folder: str | Path) -> None:
    """Raise FileError where the factors in `folder` are not of the base that `options` name."""
    config = checked_adapter(folder)
    empty = load_empty(options)
    layers = base_shapes(empty)
    # What LoRA puts on parameters of a module that is no linear layer, such as fused experts, has
    # factors of other sizes.
    others = {path for path, _ in empty.named_modules()}
    unknown: list[str] = []
    known = 0
    for layer, factor, shape in _factors(folder):
        sizes = layers.get(layer, layers.get(f"{layer}.weight"))
        if sizes is None:
            if layer.removesuffix(".base_layer") not in others:
                unknown.append(layer)
            continue
        known += 1
        of_layer, of_factor = FACTORS[factor]
        if shape[of_factor] != sizes[of_layer]:
            raise FileError(
                f"'{folder}' was trained on another model: it has {shape[of_factor]} columns or "
                f"rows for {layer}, which is {tuple(sizes)} in '{options.model}'"
                f"{_named_base(folder)}; give the base that it was trained on"
            )
    if unknown and not known:
        raise FileError(
            f"'{folder}' was trained on another model: '{options.model}' has no layer "
            f"{unknown[0]}{_named_base(folder)}; give the base that it was trained on"
        )
    named = config.get("base_model_name_or_path")
    if named and Path(named).name != Path(options.model).name:
        logger.warning(
            "'%s' says that its base is '%s'; '%s' is taken, whose weights have the same shapes",
            folder,
            named,
            options.model,
        )


def _factors(folder: str | Path) -> list[tuple[str, str, list[int]]]:
    """(layer, kind of factor, shape) of every factor of plain LoRA in the adapter's file."""
    found = []
    for name, shape in adapter_shapes(folder).items():
        kind = next((end for end in FACTORS if name.endswith(end)), None)
        if kind is not None:
            found.append((name.removeprefix(PEFT_PREFIX).removesuffix(kind), kind, shape))
    return found


def _named_base(folder: str | Path) -> str:
    named = checked_adapter(folder).get("base_model_name_or_path")
    return f" (it says that its base is '{named}')" if named else ""
