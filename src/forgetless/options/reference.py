"""Functions and classes named by text, so that a table of records imports nothing heavy.

    resolved("forgetless.record.kronecker:Kronecker")   # the class, its module imported now

A module is imported when one of its names is asked for, and not before.
"""

from __future__ import annotations

import importlib
from typing import Any


def resolved(reference: str) -> Any:
    """What `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
