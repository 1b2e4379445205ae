"""Jobs over processes that may be killed: the job at hand is lost, the others go on.

    for job in running(run, jobs, 4, killed=was_killed):
        ...                                             # each job once it is done, in the order in
                                                        which they end

Each process is a pool of its own with one worker: when the system kills it (out of memory), only
its own job fails, and a new one takes its place. They are spawned, not forked: CUDA asks for that.
A worker ends with its parent, however that ended, so that nothing writes into a folder whose lock
is free.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

import torch

Job = TypeVar("Job")


def running(
    run: Callable[[Job], None],
    jobs: Sequence[Job],
    processes: int,
    *,
    killed: Callable[[Job], None],
    spread: bool = True,
) -> Iterator[Job]:
    """Each job once it is done; `killed` is told of one whose process was killed.

    With one process, `run` is called here. `spread`: each process sees a GPU of its own, where
    there are several.
    """
    if processes <= 1:
        for job in jobs:
            run(job)
            yield job
        return
    left, workers, pending = (
        iter(jobs),
        dict[int, ProcessPoolExecutor](),
        dict[Future[None], tuple[int, Job]](),
    )

    def give(number: int) -> None:
        for job in left:
            pending[workers[number].submit(run, job)] = (number, job)
            return

    try:
        for number in range(min(processes, len(jobs))):
            workers[number] = _worker(number, spread=spread)
            give(number)
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                number, job = pending.pop(future)
                try:
                    future.result()
                except BrokenProcessPool:
                    killed(job)
                    workers[number].shutdown()
                    workers[number] = _worker(number, spread=spread)
                give(number)
                yield job
    finally:
        for worker in workers.values():
            worker.shutdown(wait=True, cancel_futures=True)


def _worker(number: int, *, spread: bool) -> ProcessPoolExecutor:
    gpu = (
        None
        if not spread
        else visible(number, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    )
    return ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_started, initargs=(gpu,)
    )


def visible(number: int, gpus: int, given: str | None) -> str | None:
    """The one GPU that process `number` is to see, of those that `given` (CUDA_VISIBLE_DEVICES)
    names; None: leave it as it is. A current device would not do: trainers choose their own, and
    spread a batch over all that they see.
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
