"""`forgetless.tune(...)`: what `forgetless tune` does, from Python.

    run = forgetless.tune("MODEL", data="domain.jsonl", out="run", learning_rate=1e-4)
    run["learning"]["nats"], run["verdict"]           # what run.json has

A model that is loaded already is trained by its own trainer, and held there by `forgetless.hold`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetless.errors import OptionError
from forgetless.files.untrusted import JsonObject
from forgetless.options.verbs import VERBS


def tune_from_python(
    model: str | Path,
    *,
    data: str | Path | list[str],
    out: str | Path,
    **given: Any,
) -> JsonObject:
    """Fine-tune `model`, a Hub name or a folder, on `data`; returns what is in `out`/run.json.

    `given` are the options of `forgetless tune` by their names in a configuration file:
    `learning_rate=1e-4`, `budget="1%"`, `general="held-out.jsonl"`. Several files of `data` are
    learned in turn. Raises ValueError or OptionError before training starts, as the verb does.
    """
    if not isinstance(model, (str, Path)):
        raise OptionError(
            "forgetless.tune loads the model and trains it with a trainer of its own: expected a "
            f"Hub name or a folder, found {type(model).__name__}; hold a model that is loaded in "
            "your own trainer by forgetless.hold(trainer, importance)"
        )
    verb = VERBS["tune"]
    files = data if isinstance(data, (str, Path)) else ",".join(map(str, data))
    options = verb.resolve({"model": str(model), "data": str(files), "out": str(out), **given})
    run: JsonObject = verb.perform(options)
    return run
