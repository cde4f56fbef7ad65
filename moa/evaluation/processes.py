"""Several processes as one: jobs are shared out, results come together in order, one error ends all.

    with join_processes() as processes:              # as torchrun or accelerate launch started them
        answers = processes.map(answer, batches)      # process r does jobs r, r + size, ...

Python objects are exchanged over gloo. Every process must make the same calls in the same order. Accelerate's
`gather_object` would wait for ever for a process that failed: here a store tells the others, so that they stop too.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from rich.progress import track
from torch.distributed.rendezvous import rendezvous

Job = TypeVar("Job")
Done = TypeVar("Done")
Value = TypeVar("Value")

# of one wait for the others, whose answers may be longer; a process that dies ends it at once
PATIENCE = timedelta(days=1)
FAILED = "failed"  # key of the store: the number of the job that failed


class PeerError(RuntimeError):
    """Another process failed."""


class Failure(NamedTuple):
    """What a process could not do; the smallest is that of the first job, as in one process."""

    job: int  # by its number over all calls of `map`
    rank: int
    message: str
    for_user: bool  # a ValueError or OSError, which a user can correct

    def error(self) -> Exception:
        if self.for_user:
            return ValueError(self.message)
        return PeerError(f"process {self.rank} failed: {self.message}")


class Processes:
    """This process among `size`; by default it is alone."""

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, store: Any = None):
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store
        self.is_main = rank == 0
        self._num_jobs = 0  # of all calls of `map` before
        self._over = size == 1  # no process to wait for

    def map(self, work: Callable[[Job], Done], jobs: Sequence[Job], *, bar: str | None = None) -> list[Done]:
        """`[work(job) for job in jobs]` on the main process, an empty list on the others. An error ends all, once the
        jobs before that one are done; each raises that of the first job that failed."""
        hidden = not (self.is_main and bar and sys.stdout.isatty())
        numbers = track(range(self.rank, len(jobs), self.size), bar or "", disable=hidden, transient=True)
        if self.size == 1:
            return [work(jobs[number]) for number in numbers]
        done: list[Done] = []
        failure, raised = None, None
        for number in numbers:
            job = self._num_jobs + number
            if self._store.check([FAILED]) and int(self._store.get(FAILED)) <= job:
                break
            try:
                done.append(work(jobs[number]))
            except Exception as error:  # raised again once the others have it
                failure, raised = self._report(job, error), error
                break
        self._num_jobs += len(jobs)
        if first := self._exchange(failure):
            raise raised if raised and failure and not failure.for_user else first.error()
        shares: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(done, shares, dst=0)
        return [shares[n % self.size][n // self.size] for n in range(len(jobs))] if shares else []

    def from_main(self, make: Callable[[], Value]) -> Value:
        made: Any = [make() if self.is_main else None]
        if self.size > 1:
            if first := self._exchange(None):
                raise first.error()
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for the others; where one failed outside of `map`, all raise its error."""
        if self.size == 1:
            return
        try:
            if not self._over and (error is None or isinstance(error, Exception)):
                first = self._exchange(self._report(self._num_jobs, error) if error else None)
                if first is not None and error is None:
                    raise first.error()
        finally:
            dist.destroy_process_group()

    def _report(self, job: int, error: Exception) -> Failure:
        """Store the failure, so that the others begin no later job."""
        self._store.set(FAILED, str(job))
        if isinstance(error, ValueError | OSError):
            return Failure(job, self.rank, str(error), True)
        return Failure(job, self.rank, f"{type(error).__name__}: {error}", False)

    def _exchange(self, failure: Failure | None) -> Failure | None:
        found: list[Failure | None] = [None] * self.size
        try:
            dist.all_gather_object(found, failure)
        except RuntimeError as error:
            self._over = True
            raise PeerError(f"process {self.rank} lost the others: {error}") from error
        self._over = any(found)
        return min(filter(None, found), default=None)


ALONE = Processes()


def join_processes() -> Processes:
    """The processes that a launcher started, as its environment variables name them; else this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    store, rank, size = next(rendezvous("env://"))
    group = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=PATIENCE)
    local_rank, store = int(os.environ.get("LOCAL_RANK", "0")), dist.PrefixStore("failures", store)
    return Processes(rank, size, local_rank=local_rank, store=store)


@contextmanager
def one_error_of_all(processes: Processes) -> Iterator[None]:
    """Inside, a user's mistake is one line of the main process, and its status 2."""
    try:
        yield
    except PeerError as error:
        sys.exit(f"error: {error}")
    except (ValueError, OSError) as error:
        if processes.is_main:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if processes.is_main else 0)
