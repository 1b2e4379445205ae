"""Jobs over processes: one that is killed loses its own job and no other; workers end with their
parent.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from forgetless.compare.processes import in_processes, visible


def work(job):
    folder, number, deadly = job
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{number}").write_text(str(os.getpid()))


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_is_done_once_and_a_killed_one_is_told(tmp_path, processes):
    jobs = [(tmp_path, number, processes > 1 and number in (0, 2)) for number in range(5)]
    killed = []
    assert sorted(in_processes(work, jobs, processes, killed=killed.append)) == jobs
    assert sorted(job[1] for job in killed) == [number for _, number, deadly in jobs if deadly]
    assert {int(path.name) for path in tmp_path.iterdir()} == {0, 1, 2, 3, 4} - {
        job[1] for job in killed
    }


def test_an_error_of_a_job_is_raised_and_ends_the_others(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(
            in_processes(
                work,
                [
                    (tmp_path / "nowhere", 0, False),
                    *[(tmp_path, number, False) for number in range(1, 4)],
                ],
                1,
                killed=lambda job: None,
            )
        )


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from forgetless.compare.processes import in_processes

        def work(place):
            Path(place).write_text(str(os.getpid()))
            time.sleep(300)

        if __name__ == "__main__":
            list(in_processes(work, sys.argv[1:], 2, killed=print))
        """)
    )
    places = [tmp_path / "0", tmp_path / "1"]
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), *map(str, places)])
    while not all(place.exists() and place.read_text() for place in places):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.time() + 20
    while time.time() < deadline and any(is_running(int(place.read_text())) for place in places):
        time.sleep(0.05)
    assert not any(is_running(int(place.read_text())) for place in places)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_each_process_sees_one_gpu_of_those_that_are_given():
    assert [visible(number, 2, None) for number in range(3)] == ["0", "1", "0"]
    assert [visible(number, 2, "4, 6") for number in range(2)] == ["4", "6"]
    assert visible(1, 1, None) is None and visible(1, 0, "") is None  # nothing to share out


def seen(place):
    place.write_text(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {'torch' in sys.modules}")


@pytest.mark.parametrize(("gpus", "expected"), [(2, {"4", "6"}), (0, {"4,6"})])
def test_a_process_has_its_gpu_before_torch_is_imported(tmp_path, monkeypatch, gpus, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    places = [tmp_path / "0", tmp_path / "1"]
    assert len(list(in_processes(seen, places, 2, killed=print, gpus=gpus))) == 2
    assert {place.read_text().split()[0] for place in places} <= expected and all(
        place.read_text().endswith("False") for place in places
    )
