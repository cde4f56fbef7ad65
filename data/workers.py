"""Worker processes, which end with the process that started them, also where that one was killed."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from threading import Thread
from typing import Any, TypeVar

Job = TypeVar("Job")
Done = TypeVar("Done")


def map_in_workers(
    work: Callable[[Job], Done],
    jobs: Sequence[Job],
    *,
    workers: int,
    method: str,
    start: Callable[..., None],
    setup: tuple[Any, ...],
    chunksize: int = 1,
) -> Iterator[Done]:
    """`work` of each job, in order, in processes that begin with `start(*setup)`.

    One worker or none is this process itself. `method` is fork (inherits `setup`) or spawn (pickles it).
    """
    if workers <= 1:
        start(*setup)
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(start, setup)) as pool:
        yield from pool.map(work, jobs, chunksize=chunksize)


def _begin(start: Callable[..., None], setup: tuple[Any, ...]) -> None:
    end_with_parent()
    start(*setup)


def end_with_parent() -> None:
    """In a worker: from now on it ends when its parent ends, or at its parent's SIGTERM alone.

    A scheduler's SIGTERM to all processes does not end it: the step under way needs its data.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the thread takes it
    Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent, reaper = multiprocessing.parent_process(), os.getppid()
    assert parent is not None, "only a worker has one"
    # the second question holds where the parent ended before the first was asked
    while os.getppid() == reaper and parent.is_alive():
        sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if sent is not None and sent.si_pid == parent.pid:
            break
    os._exit(0)
