"""Adapters from strangers: what stands in the folder is checked before PEFT makes anything of it.

    config = checked(folder)              # adapter_config.json as a mapping, fit to be loaded
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.errors import FileError, brief, printable
from forgetless.files.atomic import read_json
from forgetless.files.schema import from_json
from forgetless.files.untrusted import check_mapping, cleaned
from forgetless.model.loading import load_model
from forgetless.options.model import ModelOptions

logger = logging.getLogger("forgetless")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = (
    "LORA",
    "OFT",
    "OSF",
    "BOFT",
    "LOHA",
    "LOKR",
    "IA3",
    "VERA",
)  # methods whose adapter is weights of layers; prompts bring tokenizers and code
REFUSED = (
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
)  # beside configurations of other things (`*_config`)
PATTERNS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "feedforward_modules",
)
MOST_ITERATIONS = 100
MOST_REPEATS = 4  # of one pattern: matching a name of n letters takes up to n^4 steps


def checked(folder: str | Path) -> dict[str, Any]:
    """The configuration of the adapter in `folder`.

    Raises FileError where it is none, or asks for more than its tensors need.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileError(
            f"'{folder}' is not an adapter folder: expected {CONFIG} in it; give a folder that "
            "PEFT saved, such as the final/ folder of a run"
        )
    if not (Path(folder) / WEIGHTS).is_file():
        raise FileError(
            f"'{folder}' has no {WEIGHTS}: only safetensors are read, never a pickle; save the "
            "adapter again with PEFT"
        )
    config = check_mapping(cleaned(read_json(path)), str(path))
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise FileError(f"{path}: peft_type is {brief(kind)}; expected one of {', '.join(KINDS)}")
    given = [
        key
        for key in config
        if (key in REFUSED or (key.endswith("_config") and key != "corda_config")) and config[key]
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
    for key in PATTERNS:
        for pattern in _strings(config.get(key), f"{path}: {key}"):
            _check_pattern(pattern, f"{path}: {key}")
    _check_kinds(config, str(path))
    widest = _widest(Path(folder) / WEIGHTS, of=min if kind == "LORA" else max)
    for key, value in config.items():
        for number in (
            value.values()
            if isinstance(value, dict) and key in ("rank_pattern", "alpha_pattern")
            else [value] * isinstance(value, (int, float))
        ):
            _check_size(number, key, widest, str(path))
    return config


def with_adapter(model: nn.Module, folder: str | Path) -> Any:
    """`model` with the adapter in `folder` around it, in eval mode.

    Raises FileError where it does not fit, or lacks tensors (of which PEFT only warns).
    """
    from peft import PeftModel

    checked(folder)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = PeftModel.from_pretrained(model, str(folder)).eval()
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
        logger.warning("%s", printable(message))
    return found


def load_tuned(options: ModelOptions, folder: str | Path, *, full: bool = False) -> Any:
    """What a run on the model of `options` left in `folder`: the base with its adapter, or after
    --full the trained model itself; in eval mode.
    """
    return load_model(options, str(folder)) if full else with_adapter(load_model(options), folder)


def _check_kinds(config: dict[str, Any], where: str) -> None:
    """Raise FileError for a list where PEFT has a number or a switch (it fails on it late, or
    never), and for counts of iterations without bounds.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]):
        value = config.get(field.name)
        takes_words = not isinstance(field.default, (int, float)) or isinstance(
            field.default, bool
        )  # init_lora_weights is a switch or a word
        if isinstance(field.default, (bool, int, float)) and isinstance(
            value, (list, dict) if takes_words else (list, dict, str)
        ):
            raise FileError(
                f"{where}: {field.name} is a {type(value).__name__}, expected a value like "
                f"{field.default}"
            )
        if (
            field.name in config
            and value is None
            and isinstance(field.default, (int, float))
            and not isinstance(field.default, bool)
        ):
            raise FileError(
                f"{where}: {field.name} is null, expected a number like {field.default}"
            )
        if (
            field.name.startswith("num_")
            and isinstance(value, (int, float))
            and not 0 <= value <= MOST_ITERATIONS
        ):
            raise FileError(
                f"{where}: {field.name} is {value:.3g}, expected 0 to {MOST_ITERATIONS}"
            )
        if (
            isinstance(value, str)
            and (found := re.search(r"_niter_(\d+)", value))
            and not int(found[1][:9]) <= MOST_ITERATIONS
        ):
            raise FileError(
                f"{where}: {field.name} asks for {found[1][:9]} iterations, expected at most "
                f"{MOST_ITERATIONS}"
            )


def _strings(value: Any, where: str) -> list[str]:
    """A pattern, a list of them, or a mapping by them."""
    found = (
        []
        if value is None
        else [value]
        if isinstance(value, str)
        else list(value)
        if isinstance(value, (list, dict))
        else None
    )
    if found is None or not all(isinstance(one, str) for one in found):
        raise FileError(f"{where}: expected names, found {brief(value)}")
    return found


def _check_pattern(pattern: str, where: str) -> None:
    """Raise FileError for what is no regular expression, and for one that may take forever:
    repeated groups, many repeats.
    """
    repeats = len(re.findall(r"(?<!\\)[*+]|\{\d*,\}", pattern))
    if len(pattern) > 2000 or repeats > MOST_REPEATS or re.search(r"(?<!\\)\)\s*[*+{]", pattern):
        raise FileError(
            f"{where}: the pattern '{pattern[:80]}' repeats groups, or too much; expected names "
            "of layers"
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FileError(
            f"{where}: '{pattern[:80]}' is not a regular expression ({error})"
        ) from None


def _check_size(number: Any, key: str, widest: int, where: str) -> None:
    """Ranks and blocks are sizes of tensors: none is above what the file holds.

    Other numbers are finite factors.
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


def _widest(path: Path, *, of: Callable[[list[int]], int]) -> int:
    """The largest of the tensors' sizes: of their smaller side for LoRA, whose factors have the
    rank there; others keep blocks and ranks in other shapes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    except SafetensorError as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from None
    if not shapes or not all(math.prod(shape) for shape in shapes):
        raise FileError(f"{path} holds no tensors, or empty ones; copy it again")
    return max(of(shape) if len(shape) > 1 else max(shape, default=1) for shape in shapes)
