"""Files that are written whole or not at all: under a temporary name beside their own, which they
get when they are finished. Standard library only.

    write_json("run/run.json", data)
    with atomic_path("run/page.html") as temporary:
        temporary.write_text(...)
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgetless.errors import FileError
from forgetless.files.untrusted import load_json

# What the system says where nothing more can be written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# What torch names where it could not write; it does not say why.
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the block succeeds, removed when it does
    not (Ctrl-C included).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def room_for(path: str | Path) -> Iterator[None]:
    """Raise ValueError in one sentence where a block cannot write for want of room, whoever tried
    to write: Python, safetensors or torch.
    """
    try:
        yield
    except Exception as error:
        if (reason := _no_room(error)) is None:
            raise
        raise ValueError(
            f"cannot write '{path}': {reason}; what was there before is still whole; make room "
            "there, or give another --out"
        ) from error


def _no_room(error: BaseException | None) -> str | None:
    """Why nothing more can be written, where that is what an error or one behind it says; None for
    every other error.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if (by_safetensors := re.search(r"\(os error (\d+)\)", str(error))) is not None:
            number = int(by_safetensors[1])
        if number in NO_ROOM:
            return os.strerror(number)
        if any(name in str(error) for name in TORCH_WRITERS):
            return "it could not be written to its end, as on a full disk"
        error = error.__cause__ or error.__context__
    return None


def clear_temporaries(path: Path, *, folder: bool) -> None:
    """Remove what killed processes left of unfinished files: anywhere in a folder, or beside a file
    those of its own name. For whoever alone writes there.
    """
    own = f".{glob.escape(path.name)}.*.tmp"
    places = list(path.rglob(".*.tmp") if folder else path.parent.glob(own))
    for place in places:
        if re.fullmatch(r"\..+\.\d+\.tmp", place.name):
            discard(place)


def discard(path: Path) -> None:
    """Remove a file or folder; a folder under a temporary name first, so that one half removed is
    never taken for a whole one.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(".tmp"):
        path = path.replace(path.with_name(f".{path.name}.old.{os.getpid()}.tmp"))
    shutil.rmtree(path, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(json_ready(data), indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file when it is missing or broken."""
    try:
        return load_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: expected a JSON file, found {error}") from None


def json_ready(data: Any) -> Any:
    """Data as JSON has it: NaN and infinities as null, paths and keys as text."""
    if isinstance(data, dict):
        return {str(key): json_ready(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [json_ready(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, Path) else data
