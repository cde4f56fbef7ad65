"""Signals that ask a run to stop: it finishes the step under way, saves, and says how to go on.

SIGTERM and SIGUSR1 are what schedulers send before they take a machine away; SIGINT is Ctrl-C, and
a second one stops at once. A handler sets a flag and no more. The loop adds up the flags of all
processes with the step's figures, so that all of them stop after the same step.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not done, and running it again goes on


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

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
    """Let a data worker outlive a signal to the whole group: the run's last step needs its data.

    A SIGTERM of the training process itself still ends it: without, a run that fails could not exit.
    """
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the thread to take
    Thread(target=end_at_parents_word, daemon=True).start()


def end_at_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
