"""The dtype that a base is trained in: never plain float16 by itself.

    model = load_to_train(options)

Many checkpoints are stored in float16 (Llama 2, OPT, Pythia). The loss of a step is divided by its
tokens, so that many of its gradients fall below what float16 can hold: with 4,096, 16,384 and
131,072 tokens a step the adapter's gradient on a model of 5M parameters had a cosine to that in f32
of .992, .954 and .788 at the worst weight (median .999, .993, .856), and of .9998 in bfloat16.
`--dtype auto` therefore loads such a checkpoint in bfloat16 on a GPU that has it, and in float32
elsewhere. `--dtype float16` is trained with loss scaling, which a GPU alone has.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from forgetless.errors import OptionError
from forgetless.model.loading import device_of, load_config, load_model
from forgetless.options.model import ModelOptions

logger = logging.getLogger("forgetless")


def load_to_train(options: ModelOptions) -> nn.Module:
    """`load_model`, but for a checkpoint in float16 in a dtype that can be trained, which is said.

    Raises as `load_model` does.
    """
    if options.dtype != "auto":
        return load_model(options)
    instead = _instead_of_float16(device_of(options))
    config: Any = load_config(options)
    text_config = getattr(config, "text_config", None)
    stated = {getattr(config, "dtype", None), getattr(text_config, "dtype", None)}
    if torch.float16 in stated:
        _say(options, instead)
        return load_model(replace(options, dtype=instead))
    model = load_model(options)
    if options.quantize == "none" and next(model.parameters()).dtype == torch.float16:
        _say(options, instead)  # which its configuration does not tell
        model = model.to(getattr(torch, instead))
    return model


def _instead_of_float16(device: torch.device) -> str:
    """The dtype to train in where the checkpoint is in float16."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def _say(options: ModelOptions, instead: str) -> None:
    keeps = "" if device_of(options).type == "cpu" else "; --dtype float16 keeps it, with scaling"
    logger.info(
        "'%s' is stored in float16, in which small gradients are lost, and is loaded in %s%s",
        options.model,
        instead,
        keeps,
    )


def check_trains_in(options: ModelOptions, *, full: bool) -> None:
    """Raise OptionError where `--dtype float16` cannot be trained with loss scaling."""
    if options.dtype != "float16":
        return
    if device_of(options).type != "cuda":
        raise OptionError(
            "--dtype float16 loses small gradients without loss scaling, which there is on a GPU "
            "alone; leave it out: a checkpoint in float16 is then loaded in float32"
        )
    if full:
        raise OptionError(
            "--full with --dtype float16 trains weights in float16, whose gradients cannot be "
            "unscaled; use --dtype bfloat16 or float32"
        )
