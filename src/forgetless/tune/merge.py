"""merge(): an adapter and its base model as one plain transformers model.

    merge("run/final", "merged")

It is for whoever wants no adapter: the result loads with transformers alone, without PEFT.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgetless.errors import FileError
from forgetless.files.lock import only_writer
from forgetless.files.room import check_output_folder
from forgetless.model.adapter_files import checked_adapter, load_tuned
from forgetless.model.loading import load_tokenizer, save_whole
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve
from forgetless.report.cards import write_merged_card

logger = logging.getLogger("forgetless")


def merge(adapter: str, out: str, *, dtype: str | None = None) -> None:
    """Merge a PEFT adapter into the base model that it names, and save the result to `out`.

    `dtype` None keeps the base's. Raises FileError where the adapter names no base model,
    ValueError where `out` is not empty.
    """
    base = checked_adapter(adapter).get("base_model_name_or_path")
    if not base:
        raise FileError(
            f"'{adapter}' does not say which model it belongs to: base_model_name_or_path in its "
            "adapter_config.json is empty"
        )
    options = resolve(ModelOptions, {"model": base, "dtype": dtype or "auto"})
    check_output_folder(out)
    if any(Path(out).iterdir()):
        raise ValueError(f"'{out}' is not empty; give a new folder")
    with only_writer(out, folder=False, becomes_folder=True):
        model = load_tuned(options, adapter).merge_and_unload()
        save_whole(model, load_tokenizer(options), Path(out), _with_card(adapter, options.model))
    logger.info("merged %s into %s: %s", adapter, options.model, out)


def _with_card(adapter: str, base: str) -> Callable[[Any, Path], None]:
    """How a merged model is saved: with its card, so that the folder is whole or not there."""

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(str(folder))
        write_merged_card(folder, adapter, base)

    return save
