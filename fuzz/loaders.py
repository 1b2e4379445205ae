"""Fuzzes what reads files from strangers.

Small valid files are mutated with knowledge of their format, and each is read in a process with
limits.

    python fuzz/loaders.py --what importance --cases 100000 --seed 0
    python fuzz/loaders.py --what config data report adapter --cases 10000

A case passes when the file is read and used, or refused with a ValueError whose message is one
printable line, and when nothing is shown raw. Everything else is a finding, kept in --findings:
another exception, a crash, more than SECONDS of the processor, more than MEMORY beyond what the
process had, a pickle that is opened, a process started, a connection, a file written outside of the
case's own folder (seen by an audit hook, so inside libraries too).

Case k of a seed is the same every time, except where it grows from a mutant: TRACED of the cases
run under a trace of the lines of forgetless that they reach, and those that reach new ones join the
files that are mutated. One line per campaign goes to fuzz/campaigns.csv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

from targets import TARGETS, Target, quietly  # noqa: E402  libraries read the environment

SECONDS, MEMORY = 10, 1 << 30
TRACED, GROWN = 0.1, 0.3  # share of the cases that are traced; share that start from a mutant
PER_WORKER = 2000  # cases of one process
FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
)


class Finding(Exception):
    """What must not happen."""


class Guard:
    """Audit hook: while `folder` is set, what a loader must not do raises Finding."""

    folder: str | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            raise Finding(f"{event} {arguments!r}"[:300])
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            place = (
                os.path.realpath(os.fsdecode(arguments[0]))
                if not isinstance(arguments[0], int)
                else self.folder
            )
            if not place.startswith(self.folder) and not place.startswith(("/dev/", "/proc/")):
                raise Finding(f"wrote {arguments[0]!r}"[:300])


GUARD = Guard()


def judged(use: Callable[[Path], list[str]], path: Path) -> tuple[str, str]:
    """('loaded' | 'refused' | 'finding', why) of one file."""
    from forgetless.errors import UNSAFE

    try:
        GUARD.folder = str(path.parent)
        lines = quietly(use, path)
    except Finding as error:
        return "finding", f"Finding: {error}"
    except ValueError as error:
        message = str(error)
        if message and len(message) < 4000 and not UNSAFE.search(message):
            where = traceback.extract_tb(error.__traceback__)[-1]
            inner = "/forgetless/" in where.filename or (
                isinstance(error, ValueError) and type(error).__module__.startswith("forgetless")
            )
            return (
                ("refused", message)
                if inner
                else (
                    "finding",
                    f"ValueError from {where.filename}:{where.lineno}: {message[:200]}",
                )
            )
        return (
            "finding",
            f"message that is not one printable line: {type(error).__name__}: {message[:300]!r}",
        )
    except BaseException as error:
        where = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "/forgetless/" in frame.filename
        ]
        place = (
            f"{Path(where[-1].filename).name}:{where[-1].name}:{where[-1].lineno}" if where else "?"
        )
        return "finding", f"{type(error).__name__} at {place}: {str(error)[:200]!r}"
    finally:
        GUARD.folder = None
    raw = next((line for line in lines if UNSAFE.search(line.replace("\t", " "))), None)
    return ("finding", f"shown raw: {raw[:200]!r}") if raw is not None else ("loaded", "")


def traced(run: Callable[[], Any], met: set[tuple[str, int]]) -> tuple[Any, bool]:
    """(result, whether lines of forgetless were reached that are not in `met`), which grows."""
    before = len(met)

    def lines(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            met.add((frame.f_code.co_filename, frame.f_lineno))
        return lines

    sys.settrace(
        lambda frame, event, argument: (
            lines if "/src/forgetless/" in frame.f_code.co_filename else None
        )
    )
    try:
        return run(), len(met) > before
    finally:
        sys.settrace(None)


def worker(
    target: Target, what: str, seed: int, cases: range, folder: Path, kept: Path, pipe: int
) -> None:
    """Run the cases of one process: a line of JSON at the start and at the end of each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    signal.signal(signal.SIGPROF, _late)
    corpus: list[tuple[str, bytes]] = []
    met: set[tuple[str, int]] = set()
    with os.fdopen(pipe, "w", buffering=1) as out:
        for case in cases:
            rng = random.Random(f"{what} {seed} {case}")
            grown = bool(corpus) and rng.random() < GROWN
            usual = [
                item
                for item in sorted(target.seeds.items())
                if item[0] not in target.rare or rng.random() < 0.02
            ]
            name, data = rng.choice(corpus if grown else usual)
            data = target.change(name, data, rng)
            path = folder / name
            path.write_bytes(data)
            print(json.dumps([case, "started", name, len(met)]), file=out)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            if rng.random() < TRACED:
                (verdict, why), new = traced(lambda path=path: judged(target.use, path), met)
                if new and verdict != "finding" and name not in target.rare:
                    corpus.append((name, data))
            else:
                verdict, why = judged(target.use, path)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if verdict == "finding":
                keep(kept, what, seed, case, path, why)
            print(json.dumps([case, verdict, why, len(met)]), file=out)
            path.unlink(missing_ok=True)


def _late(*_: Any) -> None:
    raise Finding(f"took more than {SECONDS} s of the processor")


def kind(why: str) -> str:
    """What findings of one cause have in common."""
    return re.sub(r"\d+|0x[0-9a-f]+|'.*", "#", re.sub(r"/dev/shm/\w+/|/tmp/\w+/", "", why))[:80]


def keep(kept: Path, what: str, seed: int, case: int, path: Path, why: str) -> None:
    """Keep a case: its bytes, and why, in a folder of its own; three of a kind are enough."""
    place = kept / what / re.sub(r"\W+", "-", kind(why))
    if path.is_file() and (not place.exists() or len(list(place.iterdir())) < 6):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{seed}-{case}-{path.name}")
        (place / f"{seed}-{case}.txt").write_text(
            why + "\n", encoding="utf-8", errors="backslashreplace"
        )


def batch(
    make: Callable[[Path], Target],
    what: str,
    seed: int,
    cases: range,
    kept: Path,
    tell: Callable[[str, str, int], None],
) -> int:
    """Run cases in one forked process and tell of each; returns the first case that was not run:
    the next one after a crash or a hang.
    """
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as place:
        folder = Path(os.path.realpath(place))
        target = make(folder)
        reading, writing = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                os.chdir(folder)
                worker(target, what, seed, cases, folder, kept, writing)
            except BaseException:  # of the fuzzer itself
                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        os.close(writing)
        case, name, running, clock = cases.start, "", False, threading.Timer(0, lambda: None)
        with os.fdopen(reading) as lines:
            for line in lines:
                clock.cancel()
                case, verdict, why, reached = json.loads(line)
                running = verdict == "started"
                if running:
                    name = why
                    clock = threading.Timer(12 * SECONDS, os.kill, (child, signal.SIGKILL))
                    clock.start()
                else:
                    tell(verdict, why, reached)
        clock.cancel()
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == 99:
            raise RuntimeError(
                f"the fuzzer failed at case {case} of seed {seed}; its traceback is above"
            )
        if running:
            why = f"the process crashed or hung (exit {ended})"
            keep(kept, what, seed, case, folder / name, why)
            tell("finding", why, 0)
        return case + 1


def campaign(
    what: str, cases: int, seed: int, kept: Path, *, first: int = 0, show: bool = True
) -> dict[str, Any]:
    """Run `cases` cases; counts of what happened, findings by kind, lines reached, seconds."""
    counts = {"loaded": 0, "refused": 0, "finding": 0}
    found: dict[str, Any] = {}
    refusals: set[str] = set()
    lines, started, done, shown = 0, time.perf_counter(), first, 0

    def tell(verdict: str, why: str, reached: int) -> None:
        nonlocal lines
        lines = max(lines, reached)
        counts[verdict] += 1
        if verdict == "finding":
            found[kind(why)] = found.get(kind(why), 0) + 1
            if show and found[kind(why)] == 1:
                print(f"  finding: {why}", flush=True)
        elif verdict == "refused":
            refusals.add(kind(why.split(": ", 1)[-1]))

    while done < first + cases:
        done = batch(
            TARGETS[what],
            what,
            seed,
            range(done, min(done + PER_WORKER, first + cases)),
            kept,
            tell,
        )
        if show and (done - first) // 10_000 > shown:
            shown = (done - first) // 10_000
            print(
                f"{what}: {done - first:,} cases, {counts}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return {
        **counts,
        "kinds": found,
        "refusals": len(refusals),
        "lines": lines,
        "seconds": time.perf_counter() - started,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", choices=sorted(TARGETS), default=["importance"])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=HERE / "findings")
    parser.add_argument("--record", action="store_true", help="append a line to campaigns.csv")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    sys.addaudithook(GUARD)
    failed = False
    for what in options.what:
        result = campaign(
            what, options.cases, options.seed, options.findings.resolve(), first=options.first
        )
        failed = failed or result["finding"] > 0
        print(
            f"{what}, seed {options.seed}: {result['loaded']} read, {result['refused']} refused "
            f"for {result['refusals']} reasons, {result['finding']} "
            f"findings of {len(result['kinds'])} kinds; {result['lines']} lines of forgetless "
            f"reached, {result['seconds']:.0f} s",
            flush=True,
        )
        for why, count in sorted(result["kinds"].items(), key=lambda item: -item[1]):
            print(f"  {count:>6}  {why}")
        if options.record:
            row = [
                datetime.date.today(),
                what,
                options.seed,
                options.cases,
                result["loaded"],
                result["refused"],
                result["finding"],
                len(result["kinds"]),
                round(result["seconds"]),
                commit,
            ]
            with open(HERE / "campaigns.csv", "a", encoding="utf-8") as file:
                print(*row, sep=",", file=file)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
