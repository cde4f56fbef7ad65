"""Processes of one group on this machine, without a launcher: each is forked from a warm server."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


class Died(Exception):
    """A process ended without a word."""


SECONDS = 600  # a group that takes longer hangs, on a machine with much else to do too


def run_ranks(
    work: Callable[..., Any],
    *arguments: Any,
    size: int = 2,
    preload: str = "moa.evaluation.processes",
) -> list[Any]:
    """What `work(*arguments)` returns in each process, or the exception that it raised.

    AssertionError where one hangs, and Died for one that did not even do that. The server imports
    `preload`, unless it runs already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    port, pipes, ranks = free_port(), [], []
    for rank in range(size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, rank, size, port, work, arguments))
        process.start()
        theirs.close()
        pipes.append(mine)
        ranks.append(process)
    try:
        return [_result(pipe) for pipe in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _child(pipe: Any, rank: int, size: int, port: int, work: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        result = work(*arguments)
    except BaseException as error:  # the test looks at it
        result = error
    pipe.send(result)


def _result(pipe: Any) -> Any:
    assert pipe.poll(SECONDS), f"a process still hangs after {SECONDS} s"
    try:
        return pipe.recv()
    except EOFError:
        return Died()
