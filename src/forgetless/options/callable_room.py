"""Rooms that are also verbs: `forgetless.record` is the folder record/ and, called, what
`forgetless record` does.

    forgetless.record("MODEL", out="model.importance.safetensors")
    from forgetless.record.kronecker import Kronecker

Python keeps a folder's module under its name in the package once anything in it was imported, so
that a function of the same name would be gone by then. The module itself is made callable instead;
what it takes to perform the verb is imported when it is called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from forgetless.options.reference import resolved


class CallableRoom(ModuleType):
    """A folder's module which, called, is the function that its `VERB` names by reference."""

    VERB: str

    def __call__(self, *args: Any, **given: Any) -> Any:
        return resolved(self.VERB)(*args, **given)


def make_callable(module: str, verb: str) -> None:
    """Let `module`, the name of one that is being imported, be called as `verb` (module:name)."""
    room = sys.modules[module]
    room.__class__ = CallableRoom
    room.VERB = verb  # type: ignore[attr-defined]
