"""Jobs over processes that may be killed: the job at hand is lost, the others go on.

    for job in in_processes(run, jobs, 4, killed=was_killed):
        ...        # each job once it is done, in the order in which they end

Each process is a pool of its own with one worker: when the system kills it (out of memory), only
its own job fails, and a new one takes its place. They are spawned, not forked: CUDA asks for that.
A worker ends with its parent, however that ended, so that nothing writes into a folder whose lock
is free. Nothing here imports torch, so that a process imports what its jobs need and no more.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from typing import Generic, TypeVar

Work = TypeVar("Work")


def in_processes(
    run: Callable[[Work], None],
    jobs: Sequence[Work],
    processes: int,
    *,
    killed: Callable[[Work], None],
    gpus: int = 0,
) -> Iterator[Work]:
    """Each job once it is done; `killed` is told of one whose process was killed.

    With one process, `run` is called here. `gpus`: how many there are to share out; where there are
    several, each process sees one of its own.
    """
    if processes <= 1:
        for job in jobs:
            run(job)
            yield job
        return
    workers = _Workers(run, iter(jobs), gpus)
    try:
        for number in range(min(processes, len(jobs))):
            workers.start(number)
            workers.give_next(number)
        while workers.at_hand:
            for future in wait(workers.at_hand, return_when=FIRST_COMPLETED).done:
                yield workers.finish(future, killed)
    finally:
        workers.stop()


@dataclass
class _Workers(Generic[Work]):
    """Processes by their number, the jobs that no process has had yet, and those at hand."""

    run: Callable[[Work], None]
    left: Iterator[Work]
    gpus: int
    pools: dict[int, ProcessPoolExecutor] = field(default_factory=dict)
    at_hand: dict[Future[None], tuple[int, Work]] = field(default_factory=dict)

    def start(self, number: int) -> None:
        self.pools[number] = _pool_of_one(number, self.gpus)

    def give_next(self, number: int) -> None:
        """Give a process the next job, if one is left."""
        for job in self.left:
            self.at_hand[self.pools[number].submit(self.run, job)] = (number, job)
            return

    def finish(self, future: Future[None], killed: Callable[[Work], None]) -> Work:
        """The job that has ended; its process, or one in its place, has the next one."""
        number, job = self.at_hand.pop(future)
        try:
            future.result()
        except BrokenProcessPool:
            killed(job)
            self.pools[number].shutdown()
            self.start(number)
        self.give_next(number)
        return job

    def stop(self) -> None:
        for pool in self.pools.values():
            pool.shutdown(wait=True, cancel_futures=True)


def _pool_of_one(number: int, gpus: int) -> ProcessPoolExecutor:
    gpu = visible(number, gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_started, initargs=(gpu,)
    )


def visible(number: int, gpus: int, given: str | None) -> str | None:
    """The one GPU that process `number` is to see, of those that `given` (CUDA_VISIBLE_DEVICES)
    names; None: leave it as it is.

    A current device would not do: trainers choose their own, and spread a batch over all that they
    see.
    """
    names = given.split(",") if given else [str(gpu) for gpu in range(gpus)]
    return names[number % gpus].strip() if gpus > 1 else None


def _started(gpu: str | None) -> None:
    """Give a process its own GPU, before CUDA is first used in it, and end it with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)
