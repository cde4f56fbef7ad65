"""Signals that stop a run: it finishes the step under way, saves, and prints how to continue.

SIGTERM and SIGUSR1 are what schedulers send; SIGINT is Ctrl-C, and a second one stops at once. A handler only sets
a flag, which the processes add up with the step's metrics, so that all stop after the same step.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from data.workers import end_with_parent

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done; running it again continues


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def is_set(self) -> bool:
        return self.signal is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside, the signals set the flag; for the main thread, where Python handles signals."""
        before = {number: signal.signal(number, self.note) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return self.signal.name if self.signal is not None else "a signal to another process"


def leave_to_parent(worker: int) -> None:
    """Let a data worker outlive the signals that ask for a stop: the run's last step needs its data."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
