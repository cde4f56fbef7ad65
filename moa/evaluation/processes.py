"""Several processes as one: jobs are dealt out, results come together in order, one's error ends all.

    with join_processes() as processes:              # as torchrun or accelerate launch started them
        answers = processes.map(ask, batches)        # process r does jobs r, r + size, ...
        if processes.is_main:
            write(answers)                           # all of them, in the order of `batches`

Alone, `map` is a loop. What crosses are Python objects, over gloo: no GPU takes part. Every process
must make the same calls in the same order.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from rich.progress import track
from torch.distributed.rendezvous import rendezvous

Job = TypeVar("Job")
Done = TypeVar("Done")
Value = TypeVar("Value")

# of one wait for the others, who may have the longer answers; a process that dies ends it at once
PATIENCE = timedelta(days=1)
FAILED = "failed"  # key of the store: the number of the job that failed


class PeerError(RuntimeError):
    """Another process could not go on, and has said why."""


@dataclass(frozen=True, order=True)
class Failure:
    """What a process could not do; of several the first job's counts, as in one process."""

    job: int  # by its number over all calls of `map`
    rank: int
    message: str
    for_user: bool  # a ValueError or OSError: something that a user can put right

    def error(self) -> Exception:
        if self.for_user:
            return ValueError(self.message)
        return PeerError(f"process {self.rank} failed: {self.message}")


class Processes:
    """This process among `size`; by default it is alone."""

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, store: Any = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store  # where a failure is seen before the next meeting
        self._num_jobs = 0  # of all calls of `map` before
        self._over = size == 1  # nobody to meet, or no more

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def map(
        self, work: Callable[[Job], Done], jobs: Sequence[Job], *, bar: str | None = None
    ) -> list[Done]:
        """`[work(job) for job in jobs]` on the main process, an empty list on the others.

        What one process raises ends all of them, once the jobs before that one are done; each
        raises the error of the first job that failed. `bar` names a progress bar of the main
        process's own jobs.
        """
        numbers = range(self.rank, len(jobs), self.size)
        if self.size == 1:
            return [work(jobs[number]) for number in self._shown(numbers, bar)]
        done: list[Done] = []
        failure, raised = None, None
        for number in self._shown(numbers, bar):
            if self._failed_before(self._num_jobs + number):
                break
            try:
                done.append(work(jobs[number]))
            except Exception as error:  # all are told; then it is raised again
                failure, raised = self._report(self._num_jobs + number, error), error
                break
        self._num_jobs += len(jobs)
        first = self._meet(failure)
        if first is not None:
            raise raised if raised and failure and not failure.for_user else first.error()
        shares = self._gather(done)
        return [shares[n % self.size][n // self.size] for n in range(len(jobs))] if shares else []

    def dealt(self, results: Sequence[Done]) -> list[Sequence[Done]]:
        """Which of the results of `map` each process has made."""
        return [results[rank :: self.size] for rank in range(self.size)]

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What the main process makes, on all of them."""
        made: Any = [make() if self.is_main else None]
        if self.size > 1:
            if first := self._meet(None):
                raise first.error()
            dist.broadcast_object_list(made, src=0)
        return made[0]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the others; where one failed outside of `map`, all leave with its error."""
        if self.size == 1:
            return
        try:
            if not self._over and (error is None or isinstance(error, Exception)):
                failure = self._report(self._num_jobs, error) if error is not None else None
                first = self._meet(failure)
                if first is not None and error is None:
                    raise first.error()
        finally:
            dist.destroy_process_group()

    def _shown(self, numbers: Iterable[int], bar: str | None) -> Iterable[int]:
        shown = self.is_main and bar is not None and sys.stdout.isatty()
        return track(numbers, description=bar or "", disable=not shown, transient=True)

    def _report(self, job: int, error: Exception) -> Failure:
        """Tell the others before they go on to later jobs."""
        self._store.set(FAILED, str(job))
        if isinstance(error, ValueError | OSError):
            return Failure(job, self.rank, str(error), for_user=True)
        return Failure(job, self.rank, f"{type(error).__name__}: {error}", for_user=False)

    def _failed_before(self, job: int) -> bool:
        return self._store.check([FAILED]) and int(self._store.get(FAILED)) <= job

    def _meet(self, failure: Failure | None) -> Failure | None:
        """Exchange what failed; the first of it."""
        found: list[Failure | None] = [None] * self.size
        try:
            dist.all_gather_object(found, failure)
        except RuntimeError as error:
            self._over = True
            raise PeerError(f"process {self.rank} lost the others: {error}") from error
        self._over = any(found)
        return min(filter(None, found), default=None)

    def _gather(self, done: list[Done]) -> list[list[Done]] | None:
        """The lists of all processes, on the main one."""
        shares: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(done, shares, dst=0)
        return shares


ALONE = Processes()


def join_processes() -> Processes:
    """The processes that a launcher started, as its environment variables say; else this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    store, rank, size = next(rendezvous("env://"))
    group = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=PATIENCE)
    return Processes(
        rank,
        size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        store=dist.PrefixStore("failures", store),
    )
