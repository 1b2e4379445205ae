"""What TUNED names: an adapter of any trainer, a merged model, or a run that holds one of these.

    tuned = find_tuned(options)       # reads configurations alone
    model = tuned.load(options, base)

A run stands for its final/. Everything that can be refused without weights is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.errors import FileError
from forgetless.files.atomic import read_json
from forgetless.files.untrusted import check_mapping
from forgetless.model.adapter_files import (
    CONFIG,
    MODEL_CONFIG,
    adapter_shapes,
    tuned_folder,
    with_adapter,
)
from forgetless.model.adapter_fit import check_adapter_fits
from forgetless.model.adapter_rows import give_rows
from forgetless.model.loading import load_model
from forgetless.options.check import CheckOptions


@dataclass(frozen=True)
class TunedModel:
    """Where a tuned model lies: an adapter for the base, or a whole model."""

    folder: Path
    is_adapter: bool

    def give_rows(self, base: nn.Module) -> None:
        """Give the base the rows of tokens that were added for the training, where there are."""
        if self.is_adapter:
            give_rows(base, adapter_shapes(self.folder))

    def load(self, options: CheckOptions, base: nn.Module) -> Any:
        """The tuned model in eval mode; an adapter is put around `base`."""
        if self.is_adapter:
            return with_adapter(base, self.folder)
        return load_model(options, str(self.folder))


def find_tuned(options: CheckOptions) -> TunedModel:
    """The tuned model that the options name.

    Raises FileError where there is none, or one of another base.
    """
    given = Path(options.tuned).expanduser()
    folder = tuned_folder(given)
    if (folder / CONFIG).is_file():
        check_adapter_fits(options, folder)
        return TunedModel(folder, is_adapter=True)
    if (folder / MODEL_CONFIG).is_file():
        _check_same_words(options, folder)
        return TunedModel(folder, is_adapter=False)
    found = "no such folder" if not given.is_dir() else "neither of them there"
    raise FileError(
        f"'{options.tuned}' is no tuned model: expected a folder with {CONFIG} (an adapter) or "
        f"{MODEL_CONFIG} (a merged model), or a run with one of them in its final/; found {found}"
    )


def _check_same_words(options: CheckOptions, folder: Path) -> None:
    """Raise FileError for a merged model that knows fewer words than its base.

    The configuration of a base on the Hub is not looked at: it is loaded a moment later.
    """
    base = Path(options.model).expanduser() / MODEL_CONFIG
    if not base.is_file():
        return
    before, after = (
        check_mapping(read_json(path), str(path)) for path in (base, folder / MODEL_CONFIG)
    )
    words = before.get("vocab_size"), after.get("vocab_size")
    kinds = before.get("model_type"), after.get("model_type")
    known = [number for number in words if isinstance(number, int)]
    fewer = len(known) == 2 and known[1] < known[0]
    if fewer or kinds[0] != kinds[1]:
        raise FileError(
            f"'{folder}' was tuned from another model: it is of type {kinds[1]} with {words[1]} "
            f"tokens, and '{options.model}' is {kinds[0]} with {words[0]}; give the base that it "
            "was tuned from"
        )
