"""holdfast: fine-tune language models without forgetting what they know.

The method of Song et al. 2025 (arXiv 2501.13669) and what goes beyond it. Names load on first use, so that importing holdfast does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast import layers
    from holdfast.callback import HoldCallback, HoldfastCallback, RecorderCallback, TermCallback, add_term, hold
    from holdfast.importance.container import Importance
    from holdfast.importance.fisher import Fisher
    from holdfast.importance.kronecker import Kronecker
    from holdfast.importance.path import PathIntegral
    from holdfast.methods.terms import KL, Replay
    from holdfast.penalty.pull import Penalty

__version__ = "0.1.0"
__all__ = ["KL", "Fisher", "HoldCallback", "HoldfastCallback", "Importance", "Kronecker", "PathIntegral", "Penalty", "RecorderCallback", "Replay",
           "TermCallback", "add_term", "hold", "layers"]  # fmt: skip

_HOME = {
    "Fisher": "holdfast.importance.fisher",
    "HoldCallback": "holdfast.callback",
    "HoldfastCallback": "holdfast.callback",
    "Importance": "holdfast.importance.container",
    "KL": "holdfast.methods.terms",
    "Kronecker": "holdfast.importance.kronecker",
    "PathIntegral": "holdfast.importance.path",
    "Penalty": "holdfast.penalty.pull",
    "RecorderCallback": "holdfast.callback",
    "Replay": "holdfast.methods.terms",
    "TermCallback": "holdfast.callback",
    "add_term": "holdfast.callback",
    "hold": "holdfast.callback",
}


def __getattr__(name: str) -> Any:
    if name == "layers":
        return importlib.import_module("holdfast.layers")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'holdfast' has no attribute '{name}'")
