"""Files that are written whole or not at all: under a temporary name beside their own, which they
get when they are finished.

    write_json("run/run.json", data)
    with atomic_path("run/page.html") as temporary:
        temporary.write_text(...)
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from forgetless.errors import FileError
from forgetless.files.untrusted import load_json

# What the system says where nothing more can be written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# What torch names where it could not write; it does not say why.
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "basic_ios::clear", "iostream error")
# A temporary name of ours: for which name, on which machine, by which process.
TEMPORARY = re.compile(r"\.forgetless-(?:new|old)-([0-9a-f]{8})-([0-9a-f]{8})-(\d+)\.tmp")
# Seconds after which what another machine left under a temporary name counts as left for good,
# since nobody can ask there whether its process still runs: a week.
LEFT_FOR_GOOD = 7 * 24 * 3600


@contextlib.contextmanager
def atomic_path(path: str | Path, *, of: str | Path | None = None) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the block succeeds, removed when it does
    not (Ctrl-C included).

    `of`: the output that it belongs to, beside which it lies, where that is not `path` itself.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path, of=None if of is None else Path(of).name)
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


def temporary_beside(path: Path, *, of: str | None = None, kind: str = "new") -> Path:
    """A name beside `path` that only this process uses, for what is not whole yet (`kind` "new") or
    is being removed ("old").

    It says for which output it is, the name of `path` or `of`, and is short however long that is:
    a name may have 255 bytes.
    """
    output = _short_hash(path.name if of is None else of)
    return path.with_name(f".forgetless-{kind}-{output}-{machine()}-{os.getpid()}.tmp")


@functools.cache
def machine() -> str:
    """8 hex digits that differ between machines, and between containers that do not see each
    other's processes, even where they have one host name.
    """
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known.append(str(os.stat("/proc/self/ns/pid").st_ino))
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    return _short_hash("\n".join(known))


def _short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def clear_temporaries(path: Path, inside: Iterable[str] | None = None) -> None:
    """Remove what processes of ours left unfinished when they were killed; what a process that
    still runs is writing stays, and so does every file of another program.

    That is what stands beside a file `path` for it; for a folder (`inside` is given) what lies in
    it, and anywhere in those of its folders that are named there, which are ours alone.
    """
    if inside is None:
        left = [each for each in _temporaries(path.parent) if each[1] == _short_hash(path.name)]
    else:
        left = [*_temporaries(path)]
        for folder, _, _ in (step for name in inside for step in os.walk(path / name)):
            left += _temporaries(Path(folder))
    for place, _, where, number in left:
        if _is_left(place, where, number):
            discard(place)


def _temporaries(folder: Path) -> Iterator[tuple[Path, str, str, int]]:
    """(place, hash of the name it is for, machine, process) of each temporary name in a folder."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if match := TEMPORARY.fullmatch(name):
                yield folder / name, match[1], match[2], int(match[3])


def _is_left(place: Path, where: str, number: int) -> bool:
    """Whether the process that wrote under a temporary name has gone."""
    if where == machine():
        return number != os.getpid() and not psutil.pid_exists(number)
    with contextlib.suppress(OSError):
        return time.time() - place.lstat().st_mtime > LEFT_FOR_GOOD
    return False


def discard(path: Path) -> None:
    """Remove a file or folder; a folder under a temporary name first, so that one half removed is
    never taken for a whole one.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(".tmp"):
        path = path.replace(temporary_beside(path, kind="old"))
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
