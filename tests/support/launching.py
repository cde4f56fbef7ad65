"""Start processes as a user does, through `accelerate launch`, and end them where they hang."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil

from tests import ROOT

SILENCE = 120.0  # seconds without output and without computing: the processes wait for each other
IDLE = 0.05  # cores: what waits for another process takes less, a compiler or an import takes more
LONGEST = 900.0  # seconds without output, computing or not


def launch_command(name: str, *arguments: str) -> list[str]:
    """`accelerate launch` with a file of configs/accelerate/, on any free port."""
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    # without a port all that start at once would take the same one
    return [*start, "--main_process_port", "0", *arguments]


def launch(*commands: list[str], silence: float = SILENCE, longest: float = LONGEST) -> str:
    """Run commands side by side to their end, as on a machine without a GPU; returns their output.

    AssertionError, with the end of the output, where one fails, or all are hung: no output for `silence`
    seconds in which they computed next to nothing, or none for `longest` seconds. Then every process
    prints its stack before it is killed.
    """
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT) for command in commands
        ]
        try:
            hung = not wait(started, said.fileno(), silence, longest)
        finally:
            end(started)
        said.seek(0)
        words = said.read()
    assert not hung, f"no output for {silence} s:\n{words[-12_000:]}"
    assert not any(p.returncode for p in started), words[-12_000:]
    return words


def wait(started: list[subprocess.Popen], said: int, silence: float, longest: float) -> bool:
    """Until all have ended, or one has failed; False where they hang."""
    size, spent = -1, 0.0
    since = last = time.monotonic()  # of the output, and of the look at the CPU time
    while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
        time.sleep(0.1)
        now, written = time.monotonic(), os.fstat(said).st_size
        if written == size and now - last < silence:
            continue
        before, spent, last = spent, cpu_seconds(started), now
        if written != size:
            size, since = written, now
        elif spent - before < IDLE * silence or now - since > longest:
            return False
    return True


def cpu_seconds(started: list[subprocess.Popen]) -> float:
    """What the processes and their descendants have computed, ended children included."""
    total = 0.0
    for process in family(started):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and those of ended children
    return total


def family(started: list[subprocess.Popen]) -> list[psutil.Process]:
    """What still runs, launchers first."""
    found: list[psutil.Process] = []
    for process in started:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            found += [launcher, *launcher.children(recursive=True)]
    return found


def end(started: list[subprocess.Popen]) -> None:
    """Ask what still runs for its stack, then kill it."""
    running = [p for p in started if p.poll() is None]
    members = family(running)
    for sign in (signal.SIGABRT, signal.SIGKILL):
        for process in reversed(members):  # one after the other, or their words mix
            with suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
                psutil.wait_procs([process], timeout=2)
    for p in started:
        p.wait()
