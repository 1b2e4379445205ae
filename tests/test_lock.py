"""One process at a time per run: the second is told who the first is, a killed one never blocks,
torchrun's processes are one run.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from forgetless.files import lock
from forgetless.files.atomic import machine
from forgetless.files.lock import only_writer

HOLD = textwrap.dedent("""
    import sys, time
    from forgetless.files import lock
    if sys.argv[3] == "no flock":
        lock._knows_flock = lambda folder: False
    with lock.only_writer(sys.argv[1], folder=sys.argv[2] == "folder"):
        print("held", flush=True)
        time.sleep(60)
""")


@pytest.fixture
def other():
    """A function: starts another process that holds the lock of a path, and returns it once it
    does.
    """
    started = []

    def start(path: Path, *, folder: bool = True, flock: bool = True):
        words = [
            sys.executable,
            "-c",
            HOLD,
            str(path),
            "folder" if folder else "file",
            "flock" if flock else "no flock",
        ]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(params=["flock", "no flock"])
def flock(request, monkeypatch):
    if request.param == "no flock":
        monkeypatch.setattr(lock, "_knows_flock", lambda folder: False)
    return request.param == "flock"


@pytest.mark.parametrize("folder", [True, False])
def test_the_second_is_told_who_the_first_is_and_a_killed_one_does_not_block(
    tmp_path, other, flock, folder
):
    path = tmp_path / "run"
    first = other(path, folder=folder, flock=flock)
    with (
        pytest.raises(
            ValueError,
            match=(
                rf"process {first.pid} on {socket.gethostname()} \(since .*\) is writing to "
                r"'.*run'; wait for it"
            ),
        ),
        only_writer(path, folder=folder),
    ):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(list(tmp_path.rglob("*.lock"))) == 1  # what the kill left
    with only_writer(path, folder=folder):
        pass
    assert list(tmp_path.rglob(".*")) == []


def test_the_file_is_the_lock_where_the_system_has_none(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_writer(tmp_path):
        assert (tmp_path / ".lock").exists()
        with (
            pytest.raises(ValueError, match=r"if it is gone, remove '.*\.lock'"),
            only_writer(tmp_path),
        ):
            pass
        assert (tmp_path / ".lock").exists()
    # One of another host cannot be known to be gone; one of this host, whose number is another
    # process's by now, can.
    (tmp_path / ".lock").write_text(
        '{"pid": 1, "host": "elsewhere", "since": "2026-11-24 12:00:00", "began": 0}'
    )
    with pytest.raises(ValueError, match="process 1 on elsewhere"), only_writer(tmp_path):
        pass
    (tmp_path / ".lock").write_text(
        f'{{"pid": {os.getpid()}, "host": "", "machine": "{machine()}", "since": "", "began": 1}}'
    )
    with only_writer(tmp_path):
        pass


def test_steps_of_the_clock_and_containers_of_one_name_take_no_lock_away(tmp_path, monkeypatch):
    """When a process began was read off the clock, so that a step of it made the holder look gone;
    and in two containers of one host name the other's process was looked for here.
    """
    monkeypatch.setattr(lock, "_knows_flock", lambda folder: False)
    monkeypatch.setattr(lock, "UNSIGNED", 0.2)
    original = psutil.Process.create_time
    with only_writer(tmp_path):
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: original(self) + 3600)
        with pytest.raises(ValueError, match="is writing to"), only_writer(tmp_path):
            pass
    (tmp_path / ".lock").write_text(
        f'{{"pid": 0, "host": "{socket.gethostname()}", "machine": "other", "began": 1}}'
    )
    with pytest.raises(ValueError, match="if it is gone, remove"), only_writer(tmp_path):
        pass
    # One that its holder had no time to sign is watched, whatever the time of the file says.
    (tmp_path / ".lock").write_text("")
    os.utime(tmp_path / ".lock", (0, 0))
    signing = threading.Timer(0.1, (tmp_path / ".lock").write_bytes, [lock._mine()])
    signing.start()
    with pytest.raises(ValueError, match="is writing to"), only_writer(tmp_path):
        pass
    signing.join()
    (tmp_path / ".lock").write_text("")
    with only_writer(tmp_path):
        pass


def test_the_processes_of_a_launch_are_one_run(tmp_path, monkeypatch):
    with only_writer(tmp_path):
        for name, value in (("RANK", "1"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
            with only_writer(tmp_path):
                pass
            monkeypatch.delenv(name)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(ValueError, match="is writing to"), only_writer(tmp_path):
            pass
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of its machine, not of the launch
    with only_writer(tmp_path):
        assert not (tmp_path / ".lock").exists()


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    code = textwrap.dedent("""
        import os, sys, time
        from forgetless.files.lock import only_writer
        with only_writer(sys.argv[1]):
            if os.fork() == 0:
                os.close(1)
                time.sleep(5)
                os._exit(0)
            os.kill(os.getpid(), 9)
    """)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, stdout=subprocess.PIPE)
    with only_writer(tmp_path):
        pass


def test_many_at_once_never_write_together(tmp_path, flock):
    inside, most, refused = 0, 0, 0

    def work():
        nonlocal inside, most, refused
        for _ in range(40):
            try:
                with only_writer(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    inside -= 1
            except ValueError:
                refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and refused < 160 and list(tmp_path.iterdir()) == []
