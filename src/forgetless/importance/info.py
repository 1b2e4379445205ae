"""What an importance file says about itself: the parts that `Importance.info` is made of.

`info` is plain data, as it stands in the file as JSON. A file may come from another version, and
what it says that is not known here is kept. Where forgetless writes it, it is made of the records
below, so that every key stands in one place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from forgetless.files.run_json import Environment
from forgetless.files.schema import to_json
from forgetless.files.untrusted import JsonObject
from forgetless.importance.entries import Entry
from forgetless.model.fingerprint import fingerprint
from forgetless.model.linear import unwrapped

# How importance was made: the options that decided it, and what was counted.
Settings = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class EnergyErrors:
    """What a form does to the energy of each weight (importance/energy_errors.py)."""

    against: str  # the tier, or the estimator, whose energy is the true one
    weights: Mapping[str, Sequence[float]]  # weight name -> (random, evading)


@dataclass(frozen=True)
class Estimate:
    """What a recorder, or a control, says of the importance that it made."""

    estimator: str
    unit: str
    tier: str
    settings: Settings
    norms: Mapping[str, float]  # weight name -> Frobenius norm of its importance
    energy_error: EnergyErrors | None = None

    def info(self) -> JsonObject:
        """As plain data; `energy_error` only where there is one."""
        plain = dataclasses.asdict(self)
        if self.energy_error is None:
            del plain["energy_error"]
        return plain


@dataclass(frozen=True)
class BaseModel:
    """The model that importance belongs to."""

    name: str
    revision: str | None
    fingerprint: str  # of its weights, whatever dtype or quantisation they were loaded in


def of_model(model: nn.Module) -> JsonObject:
    """The base of a model at hand as the file says it, so that importance is not taken for that of
    another model; nothing for a module that is no language model of transformers.
    """
    base: Any = unwrapped(model)
    if not hasattr(base, "get_input_embeddings"):
        return {}
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return {"model": {"name": name or None, "revision": None, "fingerprint": fingerprint(model)}}


@dataclass(frozen=True)
class TextSource:
    """The text that importance was recorded on."""

    source: str | None  # file or data set
    documents: int
    tokens: int
    sha256: str  # over the documents' content
    traces: JsonObject | None = None  # by which its documents are known again (data/traces.py)

    def info(self) -> JsonObject:
        """As plain data; `traces` only where there are any."""
        plain = dataclasses.asdict(self)
        if self.traces is None:
            del plain["traces"]
        return plain


@dataclass(frozen=True)
class Origin:
    """Where importance comes from: on what, how long it took, and by which versions."""

    model: BaseModel
    data: TextSource | None  # None: no text was needed
    seconds: float  # of recording
    environment: Environment

    def info(self) -> JsonObject:
        """As plain data."""
        rate = self.data.tokens / self.seconds if self.data else None
        return {
            "model": dataclasses.asdict(self.model),
            "data": self.data.info() if self.data else {},
            "timings": {"train_seconds": self.seconds, "tokens_per_second": rate},
            "versions": to_json(self.environment),
        }


def finite_norms(entries: Mapping[str, Entry]) -> dict[str, float]:
    """Weight -> the Frobenius norm of its importance. Raises ValueError where one is not finite."""
    norms = {name: entry.norm() for name, entry in entries.items()}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise ValueError(
                f"'{name}' has non-finite importance; record again with --dtype float32"
            )
    return norms
