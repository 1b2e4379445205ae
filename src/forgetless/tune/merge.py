"""merge(): an adapter and its base model as one plain transformers model.

    merge("run/final", "merged")

It is for whoever wants no adapter: the result loads with transformers alone, without PEFT.
"""

from __future__ import annotations

import logging
from pathlib import Path

from forgetless.errors import FileError
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
    model = load_tuned(options, adapter).merge_and_unload()
    save_whole(model, load_tokenizer(options), Path(out))
    write_merged_card(out, adapter, options.model)
    logger.info("merged %s into %s: %s", adapter, options.model, out)
