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
    work: Callable[..., Done],
    jobs: Sequence[Job],
    shared: dict[str, Any],
    workers: int,
    method: str,
    chunksize: int = 1,
) -> Iterator[Done]:
    """`work(job, **shared)` of each job, in order, in processes that get `shared` once.

    One worker or none is this process itself. `method` is fork (inherits `shared`) or spawn (pickles it).
    """
    if workers <= 1:
        yield from (work(job, **shared) for job in jobs)
        return
    context, setup = multiprocessing.get_context(method), (work, shared)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=setup) as pool:
        yield from pool.map(_run, jobs, chunksize=chunksize)


_worker: dict[str, Any] = {}


def _begin(work: Callable[..., Any], shared: dict[str, Any]) -> None:
    end_with_parent()
    _worker.update(work=work, shared=shared)


def _run(job: Any) -> Any:
    return _worker["work"](job, **_worker["shared"])


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
