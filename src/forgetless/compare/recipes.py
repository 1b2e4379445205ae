"""The importance files of an experiment, recorded once for each recipe.

DIR/importance/LABEL-HASH.safetensors     by a hash of the recipe and of the text
DIR/importance/LABEL-HASH.json            what a report shows of it
DIR/importance/current.json               which of them are the experiment's as it is now
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.compare.experiment import Experiment, record_options
from forgetless.compare.own import asked, text_of_record
from forgetless.compare.summary import CURRENT
from forgetless.files.atomic import write_json
from forgetless.files.campaign_json import RecordedImportance, RecordedWeight
from forgetless.files.provenance import sha256_file
from forgetless.files.schema import write_record
from forgetless.importance.importance import Importance
from forgetless.record.record import record

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Recipe:
    """An importance file of an experiment: what it is made from, where it is, and its size."""

    mark: Sequence[Any]
    path: str
    bytes: int


def record_all(experiment: Experiment, files: Mapping[str, str], out: Path) -> dict[str, Recipe]:
    """Every importance file by its label, recorded once."""
    general = text_of_record(experiment, files)
    recipes: dict[str, Recipe] = {}
    for label, recipe in experiment.importance.items():
        text = str(recipe.get("general") or general)
        said = _mark_of_text(experiment, text)
        mark = [experiment.model, experiment.base, recipe, said]
        decided = json.dumps(mark, sort_keys=True, default=str).encode()
        name = f"{label}-{hashlib.sha256(decided).hexdigest()[:8]}"
        path = out / "importance" / f"{name}.safetensors"
        if not path.exists():
            logger.info("recording importance '%s'", label)
            path.parent.mkdir(exist_ok=True)
            record(record_options(experiment, recipe, general=general, out=str(path)))
        about = path.with_suffix(".json")
        if not about.exists():
            write_record(about, _described(Importance.load(path), label, path))
        recipes[label] = Recipe(mark, str(path), path.stat().st_size)
    if (out / "importance").is_dir():
        names = {
            label: Path(recipe.path).with_suffix(".json").name for label, recipe in recipes.items()
        }
        write_json(out / "importance" / CURRENT, names)
    return recipes


def _mark_of_text(experiment: Experiment, text: str) -> Any:
    """All that decides what a recipe records on."""
    own = experiment.own_text(text)
    if own and experiment.asking:
        return asked(own)
    return sha256_file(text) if Path(text).is_file() else text


def _described(importance: Importance, label: str, path: Path) -> RecordedImportance:
    info, settings = importance.info, importance.info.get("settings", {})
    return RecordedImportance(
        name=label,
        file=path.name,
        estimator=info.get("estimator"),
        tier=importance.tier,
        bytes=path.stat().st_size,
        seconds=info.get("timings", {}).get("train_seconds"),
        tokens=settings.get("tokens") or info.get("data", {}).get("tokens"),
        weights=[
            RecordedWeight(name, layer=_layer(name), kind=name.split(".")[-2], norm=norm)
            for name, norm in importance.norms().items()
        ],
    )


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
