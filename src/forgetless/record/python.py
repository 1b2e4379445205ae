"""`forgetless.record(...)`: what `forgetless record` does, from Python.

    importance = forgetless.record("MODEL", text="general.jsonl", out="i.safetensors")
    importance = forgetless.record(model, tokenizer)                 # what the model says itself
    importance = forgetless.record(model, tokenizer, text=["...", "..."])

A model that is loaded already is recorded as it stands, with its adapters switched off, and is
afterwards what it was. Without `out` nothing is written where a text is given; without a text
either, the file goes into the cache, where `tune` finds it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.errors import OptionError
from forgetless.files.lock import only_writer
from forgetless.files.outputs import check_new_file, local_inputs
from forgetless.importance.file import is_importance
from forgetless.importance.importance import Importance
from forgetless.model.adapters import bare
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.options.verbs import VERBS
from forgetless.record.cached import default_recording, recorded_for
from forgetless.record.checks import check_record_options, decided_by_tune
from forgetless.record.record import record
from forgetless.record.recording import record_on
from forgetless.record.state import check_unfinished
from forgetless.record.text import general_text, with_general

# A text from Python: a file, data set, 'chat' or 'self', or the documents themselves: plain text,
# or rows as a file has them, such as {"messages": [...]}.
GivenText = str | Path | Sequence[str | Mapping[str, Any]]


def record_from_python(
    model: nn.Module | str | Path,
    tokenizer: Any = None,
    *,
    text: GivenText | None = None,
    out: str | Path | None = None,
    **given: Any,
) -> Importance:
    """Record what matters in `model`, and return it.

    Args:
        model: a Hub name, a folder, or a loaded causal language model.
        tokenizer: that of a loaded model.
        text: a file, a Hub data set, 'chat' or 'self', or a list of documents; without it the
            model's own answers.
        out: the file to write.
        given: further options of `forgetless record` by their names in a configuration file, such
            as `cov_rank=16` or `estimator="fisher"`.

    Raises ValueError or OptionError before anything long begins, as the verb does.
    """
    with _as_file(text) as general, tempfile.TemporaryDirectory() as folder:
        unwritten = out is None and (general is not None or bool(set(given) - decided_by_tune()))
        place = str(Path(folder) / "importance.safetensors") if unwritten else str(out or "")
        options = VERBS["record"].resolve(
            {"model": _name_of(model), "general": general, "out": place, **given}
        )
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise OptionError(
                    "a tokenizer is for a model that is loaded already, found the name "
                    f"'{model}', whose tokenizer is loaded with it; leave it out"
                )
            importance = record(options)
        else:
            importance = _of_loaded(options, model, tokenizer)
        if unwritten:
            importance.info.pop("path", None)
    return importance


def _of_loaded(options: RecordOptions, model: nn.Module, tokenizer: Any) -> Importance:
    """Record on a model that is loaded already, below its adapters."""
    check_record_options(options)
    _check_loaded(options, tokenizer)
    with bare(model) as base:
        if not options.out:
            return recorded_for(default_recording(options, tokenizer), base, tokenizer)[0]
        check_new_file(options.out, is_importance, local_inputs(options))
        check_unfinished(options)
        with only_writer(options.out, folder=False):
            options = with_general(options, tokenizer)
            text = general_text(options, base, tokenizer)
            return record_on(options, base, tokenizer, text, None)


def _check_loaded(options: RecordOptions, tokenizer: Any) -> None:
    """Raise OptionError for what only a model that the verb loads itself can have."""
    if tokenizer is None:
        raise OptionError(
            "expected a model with its tokenizer, forgetless.record(model, tokenizer, ...), found "
            "a loaded model without one"
        )
    if ESTIMATORS[options.estimator].trains or options.calibrate:
        what = f"estimator {options.estimator}" if not options.calibrate else "calibrate"
        raise OptionError(
            f"{what} trains an adapter of its own on the model; give the model's name or folder "
            "in the place of a loaded model"
        )
    for name in ("resume", "push_to_hub"):
        if getattr(options, name):
            raise OptionError(
                f"{name} is for a model that is given by its name; a loaded model is recorded "
                "anew, and Importance.push_to_hub uploads what it gives"
            )


def _name_of(model: nn.Module | str | Path) -> str:
    """What the importance says that it is of."""
    if isinstance(model, (str, Path)):
        return str(model)
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", "")
    return str(name or type(model).__name__)


@contextlib.contextmanager
def _as_file(text: GivenText | None) -> Iterator[str | None]:
    """The text as --general names it; documents that were given themselves lie in a file for as
    long.
    """
    if text is None or isinstance(text, (str, Path)):
        yield None if text is None else str(text)
        return
    rows = [{"text": row} if isinstance(row, str) else dict(row) for row in text]
    if not rows:
        raise OptionError("expected text to be a name or a list of documents, found an empty list")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{len(rows)}-documents-given-in-python.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        file.write_text("".join(lines), encoding="utf-8")
        yield str(file)
