"""Methods that train something other than plain LoRA, each by PEFT's own implementation.

    oft       W' = W R with R orthogonal in blocks: keeps the angles between neurons (arXiv
              2306.07280); block size 4 x --rank, so that the number of trained parameters is about
              LoRA's
    osf       the --rank smallest singular directions of W are trained, orthogonally to the larger
              ones, which are frozen (arXiv 2504.07097)
    corda     LoRA that starts from the directions in which W acts least on general text (arXiv
              2406.05223, knowledge-preserving mode)
    lora-fa   LoRA with A frozen and the gradient of B corrected for it (arXiv 2308.03303): less
              activation memory

`rslora` and `full` only set options (options/methods.py). corda takes those directions out of the
base weight and trains them. Its final adapter is saved as plain LoRA of twice the rank, the
difference to the start, so that it loads on the untouched base as any other does.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.errors import OptionError
from forgetless.methods.method import Setup
from forgetless.model.adapters import peft_targets
from forgetless.model.linear import base_shapes, matching
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")
# The folder in --out with corda's adapter before training, against which the final one is saved.
INITIAL = "initial"


def check_osf(options: TuneOptions) -> None:
    """Refuse a quantised base and dropout, which osf does not know."""
    _check_base(options, "osf")
    if options.dropout:
        raise OptionError(
            f"--method osf has no dropout, found --dropout {options.dropout}; leave it out"
        )


def check_corda(options: TuneOptions) -> None:
    """Refuse a quantised base, whose weights corda could not take apart."""
    _check_base(options, "corda")


def _check_base(options: TuneOptions, name: str) -> None:
    """Raise OptionError for a base whose weights cannot be factorised."""
    if options.quantize != "none":
        raise OptionError(
            f"--method {name} factorises the base weights, which --quantize does not allow; "
            "leave one of them out"
        )


def oft(setup: Setup, model: nn.Module) -> nn.Module:
    """`model` with PEFT's OFT, which starts as the identity, up to the rounding of one product.

    Raises OptionError where the blocks do not divide a weight's inputs.
    """
    from peft import OFTConfig, get_peft_model

    o = setup.options
    block = 4 * o.rank
    shapes = base_shapes(model)
    for path, _ in matching(model, o.targets):
        inputs = shapes[path + ".weight"][1]
        if inputs % block:
            raise OptionError(
                f"--method oft: '{path}' has {inputs} inputs, not divisible "
                f"by the block size of 4 x --rank = {block}; give another --rank"
            )
    modules, conv1d = peft_targets(model, o.targets)
    return get_peft_model(
        model,
        OFTConfig(
            oft_block_size=block,
            target_modules=modules,
            fan_in_fan_out=conv1d,
            task_type="CAUSAL_LM",
        ),
    )


def osf(setup: Setup, model: nn.Module) -> nn.Module:
    """`model` with PEFT's OSF, which freezes all but the --rank smallest singular directions of a
    target weight.

    Raises OptionError where PEFT's OSF cannot do that to the model.
    """
    from peft import OSFConfig, get_peft_model

    o = setup.options
    modules, conv1d = peft_targets(model, o.targets)
    if conv1d:
        raise OptionError(
            "--method osf: PEFT's OSF knows linear layers only, found transposed ones (Conv1D); "
            "use another method for this model"
        )
    shapes = base_shapes(model)
    frozen = {
        rf"(^|\.){path.replace('.', chr(92) + '.')}$": min(shapes[path + ".weight"]) - o.rank
        for path, _ in matching(model, o.targets)
    }
    if min(frozen.values()) < 0:
        raise OptionError(
            f"--method osf: --rank {o.rank} is more than the smallest target has; give a smaller "
            "one"
        )
    return get_peft_model(
        model, OSFConfig(target_modules=modules, rank_pattern=frozen, task_type="CAUSAL_LM")
    )


def corda(setup: Setup, model: nn.Module) -> nn.Module:
    """`model` with LoRA by PEFT's CorDA from --replay's text.

    The adapter as it is before training is saved in DIR/initial.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    o = setup.options
    device = next(model.parameters()).device
    modules, conv1d = peft_targets(model, o.targets)
    config = LoraConfig(
        r=o.rank,
        lora_alpha=o.alpha,
        lora_dropout=o.dropout,
        use_rslora=o.rslora,
        target_modules=modules,
        fan_in_fan_out=conv1d,
        task_type="CAUSAL_LM",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", verbose=False),
    )

    def read() -> None:
        for ids, _ in setup.text:  # one sequence at a time: PEFT's hooks take no padding
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)

    logger.info(
        "corda: reading %d sequences, then one decomposition per target weight", len(setup.text)
    )
    preprocess_corda(model, config, run_model=read)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(Path(o.out) / INITIAL))
    return adapted


def save_as_lora(setup: Setup, model: Any, folder: Path) -> None:
    """Save corda's adapter as plain LoRA: the difference to DIR/initial, of twice the rank."""
    initial = Path(setup.options.out) / INITIAL
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(initial))


def lora_fa(setup: Setup, model: Any) -> torch.optim.Optimizer:
    """PEFT's LoRA-FA optimizer; freezes every A."""
    from peft.optimizers import create_lorafa_optimizer

    o = setup.options
    return create_lorafa_optimizer(
        model, r=o.rank, lora_alpha=int(o.alpha), lr=o.learning_rate, weight_decay=o.weight_decay
    )
