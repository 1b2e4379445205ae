"""What forgetless keeps between runs because it is long to make: answers of base models, and
importance files that `tune` recorded itself.

    cache_folder("answers")        # ~/.cache/forgetless/answers, made where it is missing

FORGETLESS_CACHE names another folder than ~/.cache/forgetless (or the one in XDG_CACHE_HOME). Every
name in it follows from what the file was made of, so all of it may be removed at any time.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from forgetless.errors import FileError
from forgetless.files.provenance import sha256_text


def cache_folder(kind: str) -> Path:
    """The folder for files of one kind. Raises FileError where it cannot be made."""
    folder = _root() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from None
    return folder


def check_cache(kind: str) -> None:
    """Raise FileError, before any long work, where no file of one kind can be written."""
    folder = cache_folder(kind)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"forgetless")
    except OSError as error:
        raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> FileError:
    return FileError(
        f"cannot write into '{folder}', the cache of forgetless: {error.strerror or error}; make "
        "room there, or let FORGETLESS_CACHE name another folder"
    )


def cached_file(kind: str, made_of: Any, ending: str) -> Path:
    """Where the cache has the file that is made of `made_of`, plain data: another place for
    anything else that it could be made of.
    """
    return cache_folder(kind) / f"{sha256_text(json.dumps(made_of, sort_keys=True))[:32]}{ending}"


def _root() -> Path:
    own = os.environ.get("FORGETLESS_CACHE")
    if own:
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "forgetless"
