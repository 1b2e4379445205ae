"""Functions and classes named by text, so that a table of records imports nothing heavy.

    resolved("forgetless.record.kronecker:Kronecker")   # the class, its module imported now

A module is imported when one of its names is asked for, and not before.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType
from typing import Any


def resolved(reference: str) -> Any:
    """What `module:name` names."""
    module, _, name = reference.partition(":")
    known = module in sys.modules
    return getattr(importlib.import_module(module) if known else _imported(module), name)


def _imported(module: str) -> ModuleType:
    """The module, imported while Python collects no garbage.

    torch, transformers and PEFT bring half a million objects that stay. To walk through them time
    and again while they come was a tenth of the import's time.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if collected:
            gc.enable()
