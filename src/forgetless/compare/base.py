"""Losses of one state of a model on the texts and domains of an experiment, and those of the bare
base model on every part, which are measured once.

    DIR/base.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from forgetless.compare.experiment import Experiment
from forgetless.compare.own import OwnParts, held_by_text, own_parts
from forgetless.compare.parts import PARTS
from forgetless.data.documents import Document, load_documents
from forgetless.data.domain import load_training_data
from forgetless.evaluate.losses import completion_loss, general_loss
from forgetless.files.campaign_json import BaseMeasured, PartLosses
from forgetless.files.measured_json import Loss
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.schema import read_record, write_record
from forgetless.files.untrusted import JsonObject
from forgetless.model.loading import load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve


def losses_on(
    experiment: Experiment,
    model: nn.Module,
    tokenizer: Any,
    files: Mapping[str, str],
    part: str,
    domains: Iterable[str],
    texts: Iterable[str] | None = None,
    own: OwnParts | None = None,
) -> PartLosses:
    """The losses of one state of a model on a part of the data; without `texts` on every general
    text. `own` has the texts that are the base's own (own.py), on which it is the divergence.
    """
    general: dict[str, Loss] = {}
    learned = {}
    limit = experiment.limit.get(part)
    for name in experiment.general if texts is None else texts:
        if own and name in own:
            general[name] = own[name].measured(model)
            continue
        documents = load_documents(files[f"general/{name}/{part}"], limit=limit)
        documents = [_cut(document, experiment.characters) for document in documents]
        general[name] = general_loss(model, tokenizer, documents).record()
    for name in domains:
        rows = load_training_data(files[f"domain/{name}/{part}"], limit=limit)
        learned[name] = completion_loss(model, tokenizer, rows).record()
    return PartLosses(general, learned)


def _cut(document: Document, characters: int | None) -> Document:
    if not characters or document.text is None:
        return document
    return dataclasses.replace(document, text=document.text[:characters])


def measure_base(experiment: Experiment, files: Mapping[str, str], out: Path) -> BaseMeasured:
    """The bare base model on every part, measured once."""
    held: dict[str, str] = {
        key: sha256_file(path)
        for key, path in sorted(files.items())
        if key.rsplit("/", 1)[1] in PARTS
    }
    mark: JsonObject = {
        "model": experiment.model,
        "base": experiment.base,
        "files": held,
        "limit": experiment.limit,
        "characters": experiment.characters,
    }
    if experiment.asking:
        own = [name for name in experiment.general if experiment.own(name)]
        mark["own"] = {name: held_by_text(experiment, files, name, "test") for name in own}
    path = out / "base.json"
    if path.exists():
        before = read_record(path, BaseMeasured)
        if before.made_from == json.loads(json.dumps(mark)):
            return before
    options = resolve(ModelOptions, experiment.model)
    model, tokenizer = load_to_train(options), load_tokenizer(options)
    losses = {}
    for part in PARTS:
        said = own_parts(experiment, model, tokenizer, part, experiment.general)
        losses[part] = losses_on(
            experiment, model, tokenizer, files, part, experiment.domains, own=said
        )
    rows = {}
    for name in experiment.domains:
        lines = Path(files[f"domain/{name}/train"]).read_text(encoding="utf-8").splitlines()
        rows[name] = len(lines)
    measured = BaseMeasured(
        made_from=mark,
        environment=environment(str(next(model.parameters()).device)),
        rows_trained=rows,
        validation=losses["validation"],
        test=losses["test"],
    )
    write_record(path, measured)
    return read_record(path, BaseMeasured)
