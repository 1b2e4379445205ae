"""merge(): an adapter and its base model as one plain transformers model.

    merge("run/final", "merged")

It is for whoever wants no adapter: the result loads with transformers alone, without PEFT.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.errors import FileError
from forgetless.files.lock import only_writer
from forgetless.files.room import check_output_folder
from forgetless.model.adapter_files import checked_adapter, tuned_folder, with_adapter
from forgetless.model.adapter_fit import check_adapter_fits
from forgetless.model.adapter_tokenizer import tuned_tokenizer
from forgetless.model.loading import load_model, model_folder, save_whole
from forgetless.model.merging import full_precision, merged_adapter
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve
from forgetless.report.cards import write_merged_card

logger = logging.getLogger("forgetless")


def merge(adapter: str, out: str, *, model: str | None = None, dtype: str | None = None) -> None:
    """Merge a PEFT adapter into its base model, and save the result to `out`.

    `adapter` is its folder, or that of a run. `model` None takes the base that the adapter names,
    `dtype` None keeps the base's. The tokenizer is the adapter's, where one lies beside it. Raises
    FileError where the adapter names no base model, ValueError where `out` is not empty.
    """
    adapter = str(tuned_folder(adapter))
    options = resolve(
        ModelOptions, {"model": model or _base_named_by(adapter), "dtype": dtype or "auto"}
    )
    is_new = not Path(out).exists()
    check_output_folder(out)
    if any(Path(out).iterdir()):
        raise ValueError(f"'{out}' is not empty; give a new folder")
    with only_writer(out, folder=False, becomes_folder=True), _left_as_it_was(Path(out), is_new):
        base = full_precision(_loaded_base(options, adapter))
        tokenizer = tuned_tokenizer(options, adapter)
        plain = merged_adapter(with_adapter(base, adapter))
        _end_with(plain, tokenizer)
        save_whole(plain, tokenizer, Path(out), _with_card(adapter, options.model))
    logger.info("merged %s into %s: %s", adapter, options.model, out)


@contextlib.contextmanager
def _left_as_it_was(out: Path, is_new: bool) -> Iterator[None]:
    """Leave no empty folder behind where nothing came of it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()
        raise


def _base_named_by(adapter: str) -> str:
    """The base model that an adapter's configuration names."""
    base = checked_adapter(adapter).get("base_model_name_or_path")
    if not base:
        raise FileError(
            f"'{adapter}' does not say which model it belongs to: base_model_name_or_path in its "
            "adapter_config.json is empty; give --model MODEL"
        )
    return str(base)


def _loaded_base(options: ModelOptions, adapter: str) -> nn.Module:
    """The base model, which fits the adapter. Raises ValueError where it is not there."""
    try:
        model_folder(options.model)
        check_adapter_fits(options, adapter)
        return load_model(options)
    except FileError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{error}. Where the base lies elsewhere, or under another name: --model MODEL"
        ) from error


def _end_with(model: Any, tokenizer: Any) -> None:
    """Let a merged model's answers end at the end of text of its tokenizer, too."""
    settings = getattr(model, "generation_config", None)
    end = tokenizer.eos_token_id
    if settings is None or end is None:
        return
    known = settings.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ends:
        settings.eos_token_id = [end, *ends] if ends else end


def _with_card(adapter: str, base: str) -> Callable[[Any, Path], None]:
    """How a merged model is saved: with its card, so that the folder is whole or not there."""

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(str(folder))
        write_merged_card(folder, adapter, base)

    return save
