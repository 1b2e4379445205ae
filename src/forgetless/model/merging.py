"""An adapter made part of its base: the plain model that says what base and adapter said together.

    model = merged_adapter(with_adapter(base, folder))

Where an adapter trains one end of tied embeddings, the two ends are taken apart first: PEFT adds
the update to the one tensor that both share, which moves the other end too.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import nn

from forgetless.model.adapters import forget_adapters
from forgetless.model.linear import below_adapters, unwrapped

logger = logging.getLogger("forgetless")


def merged_adapter(adapted: Any) -> nn.Module:
    """The base of `adapted` with the update in its weights, in place, in eval mode."""
    base: Any = unwrapped(adapted)
    was_tied = _is_tied(base)
    if was_tied and _trains_one_end(base):
        head = below_adapters(base.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        # PEFT warns of what was mended a line ago, and of what is said below.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        try:
            plain: nn.Module = adapted.merge_and_unload().eval()
        except RuntimeError as error:
            if "Impossible to merge" not in str(error):
                raise
            raise ValueError(
                f"{error} Use the adapter as it is (--adapter), or train it without lora_bias"
            ) from None
    forget_adapters(plain)
    if was_tied and not _is_tied(plain):
        _note_untied(plain)
        logger.info(
            "the adapter trains one end of tied embeddings: the merged model has input and output "
            "embeddings of its own, and is larger by one of them"
        )
    return plain


def full_precision(model: Any) -> Any:
    """A model that is stored in 4 or 8 bit with its weights written out, so that an update can be
    added to them; any other as it is. Raises ValueError where the way of storing allows no such.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    name = model.config._name_or_path
    try:
        plain = model.dequantize()
    except Exception as error:  # each way of storing has its own exceptions
        raise ValueError(
            f"'{name}' is stored in few bits, into which no update can be merged, and cannot be "
            f"written out ({error}); give --model the same base in full precision"
        ) from None
    # What reads the stored form cannot write it, and is not needed any more.
    conversions = getattr(plain, "_weight_conversions", None) or []
    plain._weight_conversions = [step for step in conversions if _can_be_undone(step)]
    logger.warning(
        "'%s' is stored in few bits: the merged model has these weights written out in full; give "
        "--model the base in full precision to merge into that",
        name,
    )
    return plain


def _can_be_undone(conversion: Any) -> bool:
    """Whether a step of transformers' loading also works when a model is saved."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _is_tied(model: Any) -> bool:
    """Whether input and output embeddings are one tensor, below any adapter."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(end is None for end in ends):
        return False
    first, last = (getattr(below_adapters(end), "weight", None) for end in ends)
    return first is not None and first is last


def _trains_one_end(model: Any) -> bool:
    """Whether an adapter changes the input or the output embeddings by an update of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return any(isinstance(end, (BaseTunerLayer, ModulesToSaveWrapper)) for end in ends)


def _note_untied(model: Any) -> None:
    """Write into the configuration that the embeddings are apart, so that loading ties nothing."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
