"""What forgetless keeps between runs because it is long to make: answers of base models, and
importance files that `tune` recorded itself.

    cache_folder("answers")        # ~/.cache/forgetless/answers, made where it is missing

FORGETLESS_CACHE names another folder than ~/.cache/forgetless (or the one in XDG_CACHE_HOME). Every
name in it follows from what the file was made of, so all of it may be removed at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for files of one kind."""
    folder = _root() / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _root() -> Path:
    own = os.environ.get("FORGETLESS_CACHE")
    if own:
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "forgetless"
