"""The tokenizer that a tuned model speaks by: the one saved beside it, where there is one.

    tokenizer = tuned_tokenizer(options, folder)

A chat template, an end of a turn or tokens that were added for the training lie beside the adapter;
the base knows nothing of them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from forgetless.errors import printable
from forgetless.model.adapter_files import tuned_folder
from forgetless.model.loading import load_tokenizer, load_tokenizer_in
from forgetless.options.model import ModelOptions

logger = logging.getLogger("forgetless")
# The file without which transformers finds no tokenizer in a folder that holds no whole model.
TOKENIZER = "tokenizer_config.json"


def tuned_tokenizer(options: ModelOptions, folder: str | Path) -> Any:
    """The tokenizer in the folder of an adapter or a tuned model, or else that of the base.

    What the former has otherwise than the base is said.
    """
    base = load_tokenizer(options)
    place = Path(tuned_folder(folder))
    if not (place / TOKENIZER).is_file():
        return base
    try:
        own = load_tokenizer_in(place, options)
    except ValueError as error:
        logger.warning("%s; the tokenizer of '%s' is taken", error, options.model)
        return base
    others = differences(base, own)
    if not others:
        return base
    logger.info(
        "the tokenizer saved in %s is taken; it differs from that of '%s' in %s",
        place,
        options.model,
        ", ".join(others),
    )
    return own


def differences(base: Any, own: Any) -> list[str]:
    """What the tokenizer `own` has otherwise than `base`, in words."""
    found = []
    if own.chat_template != base.chat_template:
        found.append("its chat template")
    for key in ("bos_token", "eos_token"):
        ours, theirs = getattr(own, key), getattr(base, key)
        if ours != theirs:
            found.append(f"its {key} ({printable(str(ours))}, not {printable(str(theirs))})")
    if len(own) != len(base):
        found.append(f"its {len(own)} tokens, not {len(base)}")
    elif own.get_vocab() != base.get_vocab():
        found.append("its tokens")
    return found
