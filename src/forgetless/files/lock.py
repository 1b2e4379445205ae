"""One process at a time per run folder or file to write: a second one is told who is there, and a
killed one never blocks.

    with only_writer("run"):                        # a folder: the lock is run/.lock
        ...
    with only_writer("importance.safetensors"):     # a file: .importance.safetensors.lock beside it
        ...

The kernel holds the lock (filelock, by `flock`) and lets go of it when the process ends, however it
ends. The file names the process and its host for the message, and is removed at the end. Where the
file system or the platform has no flock, the file itself is the lock, and the log says so; one that
a killed process of this host left is then taken over, and one of another host has to be removed by
hand. Whoever has the lock removes the temporary files of ours that killed processes left there.

The processes that torchrun starts are one run: the first (RANK 0, or LOCAL_RANK where that alone is
set) takes the lock for all of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from forgetless.files.atomic import clear_temporaries, machine, room_for
from forgetless.files.outputs import ours_in
from forgetless.files.room import check_length_of_name, check_output_file, check_output_folder

logger = logging.getLogger("forgetless")
# What flock says on file systems and platforms without it.
UNSUPPORTED = {
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
    errno.EINVAL,
    errno.ENODEV,
}
# Seconds for which a lock file is watched before it counts as left by a process that was killed
# before it could write its name. They are counted here: the clock of the machine may step.
UNSIGNED = 10


@dataclass(frozen=True)
class Holder:
    """Who wrote a lock, as its file says: anybody may have written that."""

    pid: Any
    host: Any
    machine: Any
    since: Any
    began: Any


@contextlib.contextmanager
def only_writer(
    path: str | Path, *, folder: bool = True, becomes_folder: bool = False
) -> Iterator[None]:
    """Hold the lock of a folder, or of a file to write; `becomes_folder`: of a folder that is
    written whole and put into its place as a file is, so that the lock cannot lie in it.

    Raises ValueError where nothing can be written there, and where another process is at it.
    """
    path = Path(path)
    if becomes_folder:
        check_output_folder(path.parent)
        check_length_of_name(path)
    (check_output_folder if folder or becomes_folder else check_output_file)(path)
    if not first_process():
        yield
        return
    lock = path / ".lock" if folder else path.with_name(f".{path.name}.lock")
    with room_for(path):
        held = _acquired(lock, path)
    try:
        with room_for(path):
            clear_temporaries(path, ours_in(path) if folder else None)
            yield
    finally:
        # Removed while it is held, so that whoever opened it meanwhile sees that it is gone.
        lock.unlink(missing_ok=True)
        if held is not None:
            held.release()


@contextlib.contextmanager
def in_turn(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold the lock of a file that several processes may want to write, each after the other;
    `waiting` is said where another has it.

    Where there are no locks of the kernel nobody waits, so what is written must bear that.
    """
    if not _knows_flock(path.parent):
        yield
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if waiting:
            logger.info("%s", waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def first_process() -> bool:
    """Whether this is the process of a launch that takes the lock and writes: always, but under
    torchrun.
    """
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _acquired(lock: Path, path: Path) -> FileLock | None:
    """The lock of the kernel that is held now; None where the file itself is the lock.

    Raises ValueError where another process has it.
    """
    if not _knows_flock(path if path.is_dir() else path.parent):
        logger.info("'%s': no locks of the kernel here, so the file %s is the lock", path, lock)
        _claim(lock, path)
        return None
    while True:
        held = FileLock(lock, on_acquired=_sign)
        try:
            held.acquire(blocking=False)
        except Timeout:
            if lock.exists():
                advice = "wait for it, stop it, or give another --out"
                raise ValueError(_refusal(path, _holder(lock), advice)) from None
        else:
            return held
        # The one that held it removed the file between our opening and locking it: once more.


def _sign(opened: int) -> None:
    """Write who we are into the open file of the lock."""
    os.ftruncate(opened, 0)
    os.write(opened, _mine())


def _knows_flock(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            _flock(probe.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
    return True


def _flock(opened: int) -> None:
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "no flock on this platform") from None
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _claim(lock: Path, path: Path) -> None:
    """Make the file the lock: only one process can create it."""
    for _ in range(2):
        try:
            opened = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            holder = _holder(lock)
            if not _is_gone(holder, lock) or not _removed(lock, holder):
                advice = (
                    f"wait for it, stop it, or give another --out (if it is gone, remove '{lock}')"
                )
                raise ValueError(_refusal(path, holder, advice)) from None
            continue
        os.write(opened, _mine())
        os.close(opened)
        return
    raise ValueError(_refusal(path, _holder(lock), "wait for it, or give another --out"))


def _removed(lock: Path, holder: Holder | None) -> bool:
    """Remove the lock that `holder` left.

    False where another process was faster and it is now the lock of that one.
    """
    grabbed = lock.with_name(f"{lock.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.replace(lock, grabbed)
        if _holder(grabbed) != holder:
            os.replace(grabbed, lock)
            return False
        grabbed.unlink()
    return True


def _mine() -> bytes:
    """What this process writes into a lock."""
    holder = Holder(
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=machine(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        began=_began(os.getpid()),
    )
    return json.dumps(asdict(holder)).encode()


def _holder(lock: Path) -> Holder | None:
    """Who wrote the lock; None where that cannot be read (it was just made)."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(lock.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known:
            return Holder(*(known.get(each.name) for each in fields(Holder)))
    return None


def _refusal(path: Path, holder: Holder | None, advice: str) -> str:
    who = "another process"
    if holder is not None and holder.pid is not None:
        who = f"process {holder.pid} on {holder.host} (since {holder.since})"
    return f"{who} is writing to '{path}'; {advice}"


def _is_gone(holder: Holder | None, lock: Path) -> bool:
    """Whether the writer of a lock file was a process of this machine that has ended (its number
    may be another's by now), or was killed before it wrote.
    """
    if holder is not None:
        return bool(holder.machine == machine()) and _began(holder.pid) != holder.began
    end = time.monotonic() + UNSIGNED
    with contextlib.suppress(FileNotFoundError):
        first = lock.stat().st_ino
        while lock.stat().st_ino == first and _holder(lock) is None:
            if time.monotonic() >= end:
                return True
            time.sleep(0.1)
        return False
    return True


def _began(pid: Any) -> float | None:
    """When a process was started, in a unit of the system's that no step of the clock changes;
    None where there is none of that number.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
        # Ticks since the machine was started: field 22, counted behind the name in brackets.
        stat = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
        return float(stat.rpartition(")")[2].split()[19])
    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, TypeError, ValueError):
        return None
