"""A run beside plain fine-tuning on the same data: `tune --against-plain`.

    tune_with_plain(options)     # writes OUT as tune does, then OUT/plain; the report shows both

The plain run has the same model, data, adapter, training and measurements, and nothing that holds.
It takes as long again as the training of the first, without recording.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from forgetless.files.untrusted import JsonObject
from forgetless.options.method_settings import MethodSettings
from forgetless.options.option import as_dict
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import VERBS
from forgetless.tune.tune import tune

logger = logging.getLogger("forgetless")

# The folder of the plain run, in that of the run that it stands beside.
PLAIN_BELOW = "plain"
# What holds a model, beside the options of single methods; and what the second run must not do.
HOLDING_OPTIONS: tuple[str, ...] = (
    "preset",
    "method",
    "importance",
    "strength",
    "budget",
    "layers",
    "per",
    "tau",
)
HOLDING_OPTIONS += ("anchor", "offload_importance", "replay", "replay_documents", "scale")
OF_THE_FIRST = ("against_plain", "push_to_hub", "private", "resume")


def tune_with_plain(options: TuneOptions) -> JsonObject:
    """Tune as `options` say, then plainly into the folder below; returns the run.json of the first.

    With --resume a plain run that has finished is not made again.
    """
    plain = plain_options(options)
    run = tune(options)
    if not (options.resume and (Path(plain.out) / "run.json").exists()):
        logger.info("the same by plain fine-tuning, into %s", plain.out)
        tune(plain)
    return run


def plain_options(options: TuneOptions) -> TuneOptions:
    """The options of the plain run. Raises OptionError where they do not go together."""
    methods_own = [spec.name for spec in dataclasses.fields(MethodSettings)]
    left_out = {*HOLDING_OPTIONS, *OF_THE_FIRST, *methods_own}
    given = {
        name: value
        for name, value in as_dict(options).items()
        if name not in left_out and value is not None
    }
    out = Path(options.out) / PLAIN_BELOW
    resume = options.resume and (out / "checkpoints").exists()
    general = given.get("general") or "none"
    more = {"method": "plain", "out": str(out), "resume": resume, "general": general}
    plain: TuneOptions = VERBS["tune"].resolve({**given, **more})
    return plain
