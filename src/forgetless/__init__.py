"""forgetless: fine-tune language models without forgetting what they know.

It has the method of Song et al. 2025 (arXiv 2501.13669) and what goes beyond it. Names load on
first use, so that importing forgetless does not import torch.

    held = forgetless.hold(trainer, "model.importance.safetensors")    # in your own trainer
    forgetless.record("MODEL", text="general.jsonl", out="model.importance.safetensors")
    forgetless.tune("MODEL", data="domain.jsonl", out="run")           # as the command line does
    forgetless.check("MODEL", "run", budget="1%")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forgetless.gate.check import check
    from forgetless.importance.importance import Importance
    from forgetless.integrations.held import HeldModel
    from forgetless.integrations.hold import HoldCallback, hold
    from forgetless.methods.callback import TermCallback, add_term
    from forgetless.methods.kl import KL
    from forgetless.methods.terms import Replay
    from forgetless.penalty import layers
    from forgetless.penalty.callback import PenaltyCallback
    from forgetless.penalty.pull import Penalty
    from forgetless.record.callback import RecorderCallback
    from forgetless.record.fisher import Fisher
    from forgetless.record.kronecker import Kronecker
    from forgetless.record.path import PathIntegral
    from forgetless.record.python import record_from_python as record
    from forgetless.tune.python import tune_from_python as tune

__version__ = "0.2.0"
__all__ = [
    "KL",
    "Fisher",
    "HeldModel",
    "HoldCallback",
    "Importance",
    "Kronecker",
    "PathIntegral",
    "Penalty",
    "PenaltyCallback",
    "RecorderCallback",
    "Replay",
    "TermCallback",
    "add_term",
    "check",
    "hold",
    "layers",
    "record",
    "tune",
]

_HOME = {
    "Fisher": "forgetless.record.fisher",
    "HeldModel": "forgetless.integrations.held",
    "HoldCallback": "forgetless.integrations.hold",
    "Importance": "forgetless.importance.importance",
    "KL": "forgetless.methods.kl",
    "Kronecker": "forgetless.record.kronecker",
    "PathIntegral": "forgetless.record.path",
    "Penalty": "forgetless.penalty.pull",
    "PenaltyCallback": "forgetless.penalty.callback",
    "RecorderCallback": "forgetless.record.callback",
    "Replay": "forgetless.methods.terms",
    "TermCallback": "forgetless.methods.callback",
    "add_term": "forgetless.methods.callback",
    "check": "forgetless.gate.check",
    "hold": "forgetless.integrations.hold",
}


# Names that are modules: a file of rules, and the rooms that can be called as the verbs they are.
_MODULES = {
    "layers": "forgetless.penalty.layers",
    "record": "forgetless.record",
    "tune": "forgetless.tune",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'forgetless' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
