"""Start processes as a user does, through `accelerate launch`, and end them where they hang."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
SILENCE = 120.0  # seconds without a word: the processes wait for each other


def launch_command(name: str, *arguments: str) -> list[str]:
    """`accelerate launch` with a file of configs/accelerate/, on any free port."""
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*start, *arguments]


def launch(*commands: list[str], silence: float = SILENCE) -> str:
    """Run commands side by side to their end, as on a machine without a GPU; returns what they say.

    AssertionError, with their last words, where one fails, or none says a word for `silence` seconds:
    then every process prints its stack before it is killed.
    """
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
            for command in commands
        ]
        try:
            hung = not wait(started, said.fileno(), silence)
        finally:
            end(started)
        said.seek(0)
        words = said.read()
    assert not hung, f"no word for {silence} s:\n{words[-12_000:]}"
    assert not any(p.returncode for p in started), words[-12_000:]
    return words


def wait(started: list[subprocess.Popen], said: int, silence: float) -> bool:
    """Until all have ended, or one has failed; False where they are silent for too long."""
    size, since = 0, time.monotonic()
    while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
        time.sleep(0.1)
        now = os.fstat(said).st_size
        if now != size:
            size, since = now, time.monotonic()
        elif time.monotonic() - since > silence:
            return False
    return True


def end(started: list[subprocess.Popen]) -> None:
    """Ask what still runs for its stack, then kill it."""
    launchers = [psutil.Process(p.pid) for p in started if p.poll() is None]
    family = [*launchers, *(c for p in launchers for c in p.children(recursive=True))]
    for sign in (signal.SIGABRT, signal.SIGKILL):
        for process in reversed(family):  # one after the other, or their words mix
            with suppress(psutil.NoSuchProcess):
                process.send_signal(sign)
                psutil.wait_procs([process], timeout=2)
    for p in started:
        p.wait()
