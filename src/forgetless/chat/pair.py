"""The two that are asked: a base model, and what was tuned from it.

    source = find_source(options)          # reads run.json or the adapter's configuration
    base, tuned = load_speakers(source)

Where the tuned one is an adapter, both are one loaded model: the base speaks with the adapter
switched off. A fully tuned model is loaded beside its base.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.errors import FileError
from forgetless.files.run_json import Run
from forgetless.files.schema import read_record
from forgetless.model.adapter_files import CONFIG, checked_adapter, tuned_folder, with_adapter
from forgetless.model.adapters import bare
from forgetless.model.loading import load_model
from forgetless.options.chat import ChatOptions
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve

# What a run says of how its base was loaded. trust_remote_code is not among it: a file that came
# with a model may not allow its code.
OF_THE_BASE = ("model", "revision", "dtype", "quantize")


@dataclass(frozen=True)
class Source:
    """Where the two lie: the base as `options` load it, and an adapter for it or a tuned model."""

    options: ModelOptions
    adapter: str | None = None
    tuned: str | None = None

    @property
    def tuned_folder(self) -> str:
        """Where the tuned one lies."""
        return self.adapter or self.tuned or ""


@dataclass(frozen=True)
class Speaker:
    """One of the two that are asked."""

    name: str
    model: nn.Module
    without_adapter: bool = False

    def speaking(self) -> AbstractContextManager[nn.Module]:
        """The model as this speaker uses it; on leaving, it is as it was."""
        return bare(self.model) if self.without_adapter else nullcontext(self.model)


def find_source(options: ChatOptions) -> Source:
    """What RUN, or MODEL with --adapter or --tuned, names; nothing is loaded.

    Raises FileError where there are no two models to compare.
    """
    folder = Path(options.model).expanduser()
    if options.adapter:
        checked_adapter(options.adapter)
        return Source(options, adapter=options.adapter)
    if options.tuned:
        tuned = tuned_folder(options.tuned)
        if not (tuned / "config.json").is_file():
            raise FileError(
                f"'{options.tuned}' is not a model folder: expected config.json in it; give "
                "--tuned the final/ folder of a run with --full, or --adapter for an adapter"
            )
        return Source(options, tuned=str(tuned))
    if (folder / "run.json").is_file():
        return _of_run(options, folder)
    if (folder / CONFIG).is_file():
        return Source(_on_its_base(options, folder), adapter=str(folder))
    raise FileError(
        f"'{options.model}' is not a run (expected run.json and final/ in it), so there is nothing "
        "to compare it with: give the --out folder of tune, or a base model with --adapter DIR or "
        "--tuned DIR"
    )


def _of_run(options: ChatOptions, folder: Path) -> Source:
    """What a run of tune or shrink started from, and what it left in final/."""
    final = folder / "final"
    adapted = (final / CONFIG).is_file()
    if not adapted and not (final / "config.json").is_file():
        raise FileError(
            f"'{folder}' holds no model: expected an adapter or a model in its final/; give the "
            "folder of a finished run of tune or shrink"
        )
    said = read_record(folder / "run.json", Run).configuration
    known = {key: said[key] for key in OF_THE_BASE if said.get(key)}
    if not known.get("model") and adapted:
        return Source(_on_its_base(options, final), adapter=str(final))
    if not known.get("model"):
        raise FileError(
            f"{folder / 'run.json'}: expected the base model in configuration, found none; give "
            f"the base and --tuned {final}"
        )
    base = _loaded_as(options, known)
    return Source(base, adapter=str(final)) if adapted else Source(base, tuned=str(final))


def _on_its_base(options: ChatOptions, adapter: Path) -> ModelOptions:
    """The options with the base model that an adapter names."""
    base = checked_adapter(adapter).get("base_model_name_or_path")
    if not base:
        raise FileError(
            f"'{adapter}' does not say which model it belongs to: base_model_name_or_path in its "
            f"{CONFIG} is empty; give the base, and --adapter {adapter}"
        )
    return replace(options, model=base)


def _loaded_as(options: ChatOptions, known: dict[str, Any]) -> ModelOptions:
    """The options with what a run says of its base, where they don't say it themselves."""
    recorded, usual = resolve(ModelOptions, known), ModelOptions()
    taken = {
        key: getattr(recorded, key)
        for key in OF_THE_BASE
        if key == "model" or getattr(options, key) == getattr(usual, key)
    }
    return replace(options, **taken)


def load_speakers(source: Source) -> tuple[Speaker, Speaker]:
    """The base and the tuned model, ready to be asked.

    Raises ValueError where one is not there, FileError where the adapter does not fit.
    """
    model = load_model(source.options)
    if source.adapter is not None:
        adapted = with_adapter(model, source.adapter)
        return Speaker("base", adapted, without_adapter=True), Speaker("tuned", adapted)
    return Speaker("base", model), Speaker("tuned", load_model(source.options, source.tuned))
