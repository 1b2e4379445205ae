"""Files of a run: written whole or not at all, with what is needed to trace a number back. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from holdfast.reading import FileError, load_json

PACKAGES = ("holdfast", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "lm_eval")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the block succeeds, removed when it does not (Ctrl-C included)."""
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
    """Raise ValueError in one sentence where a block cannot write for want of room, whoever tried: Python, safetensors or torch."""
    try:
        yield
    except Exception as error:
        if (reason := _no_room(error)) is None:
            raise
        raise ValueError(f"cannot write '{path}': {reason}; what was there before is still whole; make room there, or give another --out") from error


def _no_room(error: BaseException | None) -> str | None:
    """Why nothing more can be written, where that is what an error or one behind it says; None for every other error."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if (told := re.search(r"\(os error (\d+)\)", str(error))) is not None:  # safetensors
            number = int(told[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            return os.strerror(number)
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):  # torch does not say why
            return "it could not be written to its end, as on a full disk"
        error = error.__cause__ or error.__context__
    return None


def clear_temporaries(path: Path, *, folder: bool) -> None:
    """Remove what killed processes left of unfinished files: anywhere in a folder, or beside a file those of its own name. For whoever alone writes there."""
    found = path.rglob(".*.tmp") if folder else path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    for place in [place for place in found if re.fullmatch(r"\..+\.\d+\.tmp", place.name)]:
        discard(place)


def discard(path: Path) -> None:
    """Remove a file or folder; a folder under a temporary name first, so that one half removed is never taken for a whole one."""
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
    write_text(path, json.dumps(_plain(data), indent=1) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file when it is missing or broken."""
    try:
        return load_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: expected a JSON file, found {error}") from None


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, Path) else data


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions, platform, device, and the commit of the source tree where it is a git checkout (null otherwise)."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit, dirty = _commit()
    return {"python": platform.python_version(), "platform": platform.platform(), "versions": versions, "device": device, "commit": commit, "dirty": dirty}


def _commit() -> tuple[str | None, bool | None]:
    here = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        if run("ls-files", "runs.py") != "runs.py":
            return None, None
        return run("rev-parse", "HEAD"), bool(run("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_output_folder(path: str | Path) -> None:
    """Make the folder and try to write into it. Raises ValueError before any long work where that fails."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"holdfast")
    except OSError as error:
        raise ValueError(f"cannot write into '{path}': {error.strerror or error}; give another --out, or make room there") from None


def check_output_file(path: str | Path) -> None:
    """Check that a file can be written at `path`. Raises ValueError before any long work where not."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder, expected the name of a file to write; give another --out")
    check_output_folder(path.parent)


def check_free_space(path: str | Path, needed: int) -> None:
    """Raise ValueError unless `needed` bytes are free where `path` lies."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"'{path}' needs about {needed / 2**20:.0f} MiB, found {free / 2**20:.0f} MiB free; give another --out, or make room there")


def free_memory() -> int | None:
    """Bytes of CPU memory that may still be taken: free, or held by caches that give way, within a container's limit; None where the system does not say."""
    free = [_kilobytes("/proc/meminfo", "MemAvailable:"), _left_in_container()]
    if free[0] is None and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free[0] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min((size for size in free if size is not None), default=None)


def _kilobytes(file: str, label: str) -> int | None:
    """The number behind `label` in a file of the kernel, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="ascii").splitlines():
            if line.startswith(label):
                return int(line.split()[1]) * 1024
    return None


def _left_in_container() -> int | None:
    """What a control group's limit leaves, its file cache not counted; None without a limit."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # 'max' is no number: no limit
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, limit - used + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0)))
    return None
