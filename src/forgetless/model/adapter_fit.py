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
from forgetless.model.adapter_files import WEIGHTS, checked_adapter
from forgetless.model.linear import base_shapes
from forgetless.model.loading import load_empty
from forgetless.options.model import ModelOptions

logger = logging.getLogger("forgetless")
# How PEFT begins the names of an adapter's tensors, and how it ends those of LoRA's factors, with
# the side of the layer's weight (out, in) and the side of the factor that are equal.
PEFT_PREFIX = "base_model.model."
FACTORS = {".lora_A.weight": (1, 1), ".lora_B.weight": (0, 0)}


def check_adapter_fits(options: ModelOptions, folder: str | Path) -> None:
    """Raise FileError where the factors in `folder` are not of the base that `options` name."""
    layers = base_shapes(load_empty(options))
    unknown: list[str] = []
    known = 0
    for layer, factor, shape in _factors(folder):
        sizes = layers.get(layer, layers.get(f"{layer}.weight"))
        if sizes is None:
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
    named = checked_adapter(folder).get("base_model_name_or_path")
    if named and Path(named).name != Path(options.model).name:
        logger.info("'%s' says that its base is '%s'; '%s' is taken", folder, named, options.model)


def _factors(folder: str | Path) -> list[tuple[str, str, list[int]]]:
    """(layer, kind of factor, shape) of every factor of plain LoRA in the adapter's file."""
    from safetensors import safe_open

    found = []
    with safe_open(str(Path(folder) / WEIGHTS), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            kind = next((end for end in FACTORS if name.endswith(end)), None)
            if kind is not None:
                layer = name.removeprefix(PEFT_PREFIX).removesuffix(kind)
                found.append((layer, kind, file.get_slice(name).get_shape()))
    return found


def _named_base(folder: str | Path) -> str:
    named = checked_adapter(folder).get("base_model_name_or_path")
    return f" (it says that its base is '{named}')" if named else ""
