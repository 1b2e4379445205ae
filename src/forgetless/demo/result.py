"""demo.json: what the demo measured, a row for each state of the model and each seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forgetless.files.run_json import Environment

# The states of the model, in the order of the table.
STATES = ("base", "plain", "plain, smaller rate", "plain, scaled back", "hold")


@dataclass(frozen=True)
class StateRow:
    """What one state of the model knows.

    Losses are in nats per token, accuracies from 0 to 1; seconds are those of training.
    """

    general_accuracy: float
    general_loss: float
    domain_accuracy: float
    domain_loss: float
    seconds: float | None = None
    setting: str = ""


Seed = Mapping[str, StateRow]  # the rows of one seed by their states


@dataclass(frozen=True)
class RecordedFile:
    """The importance file that the demo recorded."""

    path: str
    mib: float
    record_seconds: float | None


@dataclass(frozen=True)
class DemoResult:
    """All of demo.json; the seconds are those of the whole demo."""

    environment: Environment | None
    importance: RecordedFile
    seconds: float
    seeds: list[Seed]
