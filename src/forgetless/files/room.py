"""Whether there is room: a folder that can be written to, space on the disk, free memory. It is
asked before long work, so that a mistake costs seconds and not a training.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

# Bytes that the names of what stands beside an output are longer than its own, at most: those of
# its lock (.NAME.lock) and of the states of a recording (NAME.state.17).
BESIDE = 12


def check_output_folder(path: str | Path) -> None:
    """Make the folder and try to write into it.

    Raises ValueError before any long work where that fails.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"forgetless")
    except OSError as error:
        raise ValueError(
            f"cannot write into '{path}': {error.strerror or error}; give another --out, or make "
            "room there"
        ) from None


def check_output_file(path: str | Path) -> None:
    """Check that a file can be written at `path`.

    Raises ValueError before any long work where that fails.
    """
    path = Path(path)
    check_output_folder(path.parent)
    check_length_of_name(path)
    if path.is_dir():
        raise ValueError(
            f"'{path}' is a folder, expected the name of a file to write; give another --out"
        )


def check_length_of_name(path: Path) -> None:
    """Raise ValueError where the names of what stands beside an output would be too long."""
    longest, length = _longest_name(path.parent), len(os.fsencode(path.name))
    if longest is not None and length > longest - BESIDE:
        raise ValueError(
            f"the name of '{path}' has {length} bytes, expected at most {longest - BESIDE}, since "
            "files with a longer name stand beside it; give another --out"
        )


def _longest_name(folder: Path) -> int | None:
    """Bytes that a name in a folder may have; None where the system does not say."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return None


def check_free_space(path: str | Path, needed: int) -> None:
    """Raise ValueError unless `needed` bytes are free where `path` lies."""
    folder = Path(path).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"'{path}' needs about {needed / 2**20:.0f} MiB, found {free / 2**20:.0f} MiB free; "
            "give another --out, or make room there"
        )


def free_memory() -> int | None:
    """Bytes of CPU memory that may still be taken: free, or held by caches that give way, within a
    container's limit; None where the system does not say.
    """
    free = _kernel_bytes("/proc/meminfo", "MemAvailable:")
    if free is None and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min((size for size in (free, _left_in_container()) if size is not None), default=None)


def _kernel_bytes(file: str, label: str) -> int | None:
    """The number of kilobytes behind `label` in a file of the kernel, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text(encoding="ascii").splitlines():
            if line.startswith(label):
                return int(line.split()[1]) * 1024
    return None


def _left_in_container() -> int | None:
    """What a control group's limit leaves, its file cache not counted; None without a limit."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # 'max' is no number: no limit
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        counts = dict(line.split() for line in lines)
        cache = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
        return max(0, limit - used + cache)
    return None
