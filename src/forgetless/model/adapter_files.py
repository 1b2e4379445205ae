"""Adapters from strangers: a folder is checked before PEFT makes anything of what stands in it.

    config = checked_adapter(folder)      # adapter_config.json as a mapping, fit to be loaded
    model = with_adapter(base, folder)    # PEFT's model

PEFT allocates what the configuration claims before it reads a weight, matches its patterns as
regular expressions, and falls back to a pickled file (which it reads without running code). Here
ranks may not exceed what the tensors of the file have, patterns may not backtrack without end, and
only safetensors are read.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.errors import FileError, brief, printable
from forgetless.files.atomic import read_json
from forgetless.files.schema import from_json
from forgetless.files.untrusted import JsonObject, check_mapping, cleaned
from forgetless.model.adapter_patterns import check_patterns
from forgetless.model.adapter_rows import give_rows
from forgetless.model.base_values import remember_biases
from forgetless.model.loading import load_model
from forgetless.options.model import ModelOptions

logger = logging.getLogger("forgetless")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# What a folder with a whole model holds.
MODEL_CONFIG = "config.json"
# How PEFT begins the names of an adapter's tensors.
PEFT_PREFIX = "base_model.model."
# PEFT's methods whose adapter is weights of layers; prompts bring tokenizers and code.
ADAPTER_KINDS = ("LORA", "OFT", "OSF", "BOFT", "LOHA", "LOKR", "IA3", "VERA")
# Settings that are not taken from a file, beside configurations of other things (`*_config`).
REFUSED = ("layer_replication", "alora_invocation_tokens")
# Settings of how an adapter was started, which say nothing of the trained one.
STARTS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")
# How the names of tensors end that hold rows of single tokens.
TOKEN_ROWS = "trainable_tokens_delta"
# The most iterations that an initialisation may ask for.
MOST_ITERATIONS = 100


def checked_adapter(folder: str | Path) -> JsonObject:
    """The configuration of the adapter in `folder`.

    Raises FileError where it is none, or asks for more than its tensors need.
    """
    folder = tuned_folder(folder)
    path = folder / CONFIG
    _check_files(folder)
    shapes = adapter_shapes(folder)
    config = check_mapping(cleaned(read_json(path)), str(path))
    _check_method(config, path)
    check_patterns(config, str(path), _layers_of(shapes))
    _check_kinds(config, str(path))
    _check_tokens(config.get("trainable_token_indices"), shapes, str(path))
    # LoRA's factors have the rank as their smaller side; others keep blocks and ranks elsewhere.
    widest = _widest(shapes, of=min if config["peft_type"] == "LORA" else max)
    for key, value in config.items():
        for number in _numbers_of(key, value):
            _check_size(number, key, widest, str(path))
    return config


def _check_tokens(tokens: Any, shapes: dict[str, list[int]], where: str) -> None:
    """Raise FileError for more single tokens than the file has rows for: PEFT makes these first."""
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens or []]
    rows = [shape[0] for name, shape in shapes.items() if name.endswith(TOKEN_ROWS)]
    for asked in lists:
        if not isinstance(asked, list) or not all(type(token) is int for token in asked):
            raise FileError(f"{where}: trainable_token_indices: expected numbers of tokens")
        if len(asked) > max(rows, default=0):
            raise FileError(
                f"{where}: trainable_token_indices has {len(asked)} tokens, and the adapter rows "
                f"for {max(rows, default=0)}; the configuration is of another adapter"
            )


def _check_files(folder: str | Path) -> None:
    """Raise FileError unless a folder has the two files of an adapter."""
    if not (Path(folder) / CONFIG).is_file():
        raise FileError(
            f"'{folder}' is not an adapter folder: expected {CONFIG} in it; give a folder that "
            "PEFT saved, such as the final/ folder of a run"
        )
    if not (Path(folder) / WEIGHTS).is_file():
        raise FileError(
            f"'{folder}' has no {WEIGHTS}: only safetensors are read, never a pickle; save the "
            "adapter again with PEFT"
        )


def _check_method(config: JsonObject, path: Path) -> None:
    """Raise FileError for a method that is not taken, or settings that bring more than weights."""
    kind = config.get("peft_type")
    if kind not in ADAPTER_KINDS:
        raise FileError(
            f"{path}: peft_type is {brief(kind)}; expected one of {', '.join(ADAPTER_KINDS)}"
        )
    given = [
        key
        for key in config
        if config[key] and (key in REFUSED or (key.endswith("_config") and key not in STARTS))
    ]
    if given:
        raise FileError(
            f"{path}: '{given[0]}' is not taken from a file; merge the adapter where it was trained"
        )
    if not isinstance(config.get("base_model_name_or_path"), (str, type(None))):
        raise FileError(
            f"{path}: base_model_name_or_path is {brief(config['base_model_name_or_path'])}, "
            "expected a name"
        )


def _numbers_of(key: str, value: Any) -> Collection[Any]:
    """The numbers that a setting of an adapter's configuration gives."""
    if isinstance(value, dict) and key in ("rank_pattern", "alpha_pattern"):
        return value.values()
    return [value] if isinstance(value, (int, float)) else []


def with_adapter(model: nn.Module, folder: str | Path) -> Any:
    """`model` with the adapter in `folder` around it, in eval mode.

    Raises FileError where it does not fit, or lacks tensors (of which PEFT only warns).
    """
    from peft import PeftModel

    folder = tuned_folder(folder)
    config = checked_adapter(folder)
    # The names in the adapter's file are a stranger's; those that PEFT will match are these.
    check_patterns(config, str(folder / CONFIG), [name for name, _ in model.named_modules()])
    give_rows(model, adapter_shapes(folder))
    if config.get("bias", "none") != "none":
        remember_biases(model)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    except MemoryError:
        raise
    except Exception as error:  # PEFT and torch have their own exceptions for each way not to fit
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileError(
            f"'{folder}' does not fit the model: {reason[-1].strip()}; give the base that it was "
            "trained on"
        ) from None
    for warning in said:
        message = str(warning.message)
        if message.startswith("Found missing adapter keys"):
            raise FileError(
                f"'{folder}' lacks tensors of the adapter ({message.partition(': ')[2]}); copy "
                "it again, or save it again with PEFT"
            )
        # What hosts will rename among themselves says nothing of the adapter.
        if not issubclass(warning.category, (FutureWarning, DeprecationWarning)):
            logger.warning("%s", printable(message))
    return adapted


def load_tuned(options: ModelOptions, folder: str | Path, *, full: bool = False) -> Any:
    """What a run on the model of `options` left in `folder`, in eval mode.

    It is the base with its adapter, or after --full the trained model itself.
    """
    if full:
        return load_model(options, str(tuned_folder(folder)))
    return with_adapter(load_model(options), folder)


def _check_kinds(config: JsonObject, where: str) -> None:
    """Raise FileError for a list where PEFT has a number or a switch, and for endless iterations.

    PEFT fails on the former late, or never.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]):
        if field.name in config:
            _check_value_kind(field.name, config[field.name], field.default, where)
            _check_iterations(field.name, config[field.name], where)


def _check_value_kind(name: str, value: Any, default: Any, where: str) -> None:
    """Raise FileError for a value of another kind than PEFT's default for it."""
    is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    unfit: tuple[type, ...] = ()
    if isinstance(default, bool):
        unfit = (list, dict)  # a word may stand for a switch, as in init_lora_weights
    elif is_number:
        unfit = (list, dict, str)
    if isinstance(value, unfit):
        raise FileError(
            f"{where}: {name} is a {type(value).__name__}, expected a value like {default}"
        )
    if value is None and is_number:
        raise FileError(f"{where}: {name} is null, expected a number like {default}")


def _check_iterations(name: str, value: Any, where: str) -> None:
    """Raise FileError for a setting that asks for too many iterations."""
    counts = name.startswith("num_") and isinstance(value, (int, float))
    if counts and not 0 <= value <= MOST_ITERATIONS:
        raise FileError(f"{where}: {name} is {value:.3g}, expected 0 to {MOST_ITERATIONS}")
    if isinstance(value, str):
        asked = re.search(r"_niter_(\d+)", value)
        if asked and not int(asked[1][:9]) <= MOST_ITERATIONS:
            raise FileError(
                f"{where}: {name} asks for {asked[1][:9]} iterations, expected at most "
                f"{MOST_ITERATIONS}"
            )


def _check_size(number: Any, key: str, widest: int, where: str) -> None:
    """Raise FileError for a rank or block above what the file's tensors have, or a wild number.

    Ranks and blocks are sizes of tensors; other numbers are finite factors.
    """
    if isinstance(number, bool):
        return
    from_json(number, float, f"{where}: {key}")
    size = key == "r" or key == "rank_pattern" or key.endswith(("_r", "_rank", "block_size"))
    if size and not (isinstance(number, int) and 0 <= number <= widest):
        raise FileError(
            f"{where}: {key} is {number}, but no tensor of the adapter is that wide (the widest "
            f"has {widest}); the configuration is of another adapter"
        )
    if not abs(number) <= 1e9:
        raise FileError(f"{where}: {key} is {number:.3g}, expected at most 1e9")


def adapter_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of the adapter in `folder`, of which none is read.

    Raises FileError where the file is not whole, or holds none.
    """
    from safetensors import SafetensorError, safe_open

    path = tuned_folder(folder) / WEIGHTS
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from None
    if not shapes or not all(math.prod(shape) for shape in shapes.values()):
        raise FileError(f"{path} holds no tensors, or empty ones; copy it again")
    return shapes


def _widest(shapes: dict[str, list[int]], *, of: Callable[[list[int]], int]) -> int:
    """The largest of the tensors' sizes, of which `of` picks one for each shape."""
    return max(of(shape) if len(shape) > 1 else max(shape, default=1) for shape in shapes.values())


def _layers_of(shapes: dict[str, list[int]]) -> list[str]:
    """The layers that an adapter's tensors belong to, and the modules around them."""
    paths = {name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in shapes}
    return sorted(paths | {path.rpartition(".")[0] for path in paths})


def tuned_folder(given: str | Path) -> Path:
    """The folder that holds an adapter or a model: `given`, or where that is a run, its final/."""
    folder = Path(given).expanduser()
    if not holds_model(folder) and holds_model(folder / "final"):
        return folder / "final"
    return folder


def holds_model(folder: Path) -> bool:
    """Whether an adapter or a model lies in a folder."""
    return (folder / CONFIG).is_file() or (folder / MODEL_CONFIG).is_file()
