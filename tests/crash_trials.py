"""Crash trials: a train.py process is struck at a random moment, and what it left is judged.

    python -m tests.crash_trials [--trials 20] [--kinds kill term disk worker] [--seed 0]

kill: SIGKILL.  term: SIGTERM.  disk: the disk of the run gets full.  worker: a data worker is killed.
Every other strike waits until a checkpoint is being written. Judged are
    torn       a step folder that does not verify, or `last` or `best` that names none
    unequal    log and last checkpoint, after --resume, against those of the unbroken run
    wrong end  another exit status or message than docs/crashes.md promises
"""

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import train
from moa.checkpoint import pointed, read_json, verify
from moa.training.signals import EXIT_STATUS
from tests.support.toy import read_log, toy_world

KINDS = ("kill", "term", "disk", "worker")
SETTINGS = ("train.save_every=1", "train.keep_last=3")
DISK = 2**22  # bytes of the small disk, several times what a run takes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    writing: bool  # a checkpoint was being written when the strike came
    torn: str  # empty: nothing
    unequal: str
    wrong_end: str


# Processes --------------------------------------------------------------------------------------


def child(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    """train.py, with its output in a file."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    # as in train.py by itself: else its workers would be children of yet another server
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["train.py", *arguments]
    train.main()


def start(arguments: list[str], output: Path, **environment: str) -> BaseProcess:
    """A process of its own, forked from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "tests.support.toy"])
    process = context.Process(target=child, args=(arguments, str(output), environment))
    process.start()
    return process


def wait_until(condition: Callable[[], bool], process: BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.0005)


def pid_of(process: BaseProcess) -> int:
    assert process.pid is not None, "it was started"
    return process.pid


def workers_of(process: BaseProcess) -> list[int]:
    """The data workers of a training process: its only children."""
    children = Path(f"/proc/{pid_of(process)}/task/{pid_of(process)}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def outlived_by(workers: list[int], seconds: float = 20.0) -> bool:
    """Whether a process of these is still there after so long."""
    until = time.monotonic() + seconds
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until:
            return bool(left)
        time.sleep(0.01)
    return False


# Runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Course:
    """The toy world's folder, and its unbroken run, which every broken one must repeat."""

    folder: Path
    seconds: float  # of the unbroken run's steps

    @property
    def unbroken(self) -> Path:
        return self.folder / "unbroken"


def run(course: Path, out: Path, output: Path, *more: str) -> BaseProcess:
    arguments = ["--config", str(course / "run.yaml"), f"out={out}", *SETTINGS, *more]
    return start(arguments, output)


def make_course(folder: Path) -> Course:
    (folder / "run.yaml").write_text(yaml.safe_dump(toy_world(folder), sort_keys=False))
    out, output = folder / "unbroken", folder / "unbroken.txt"
    process = run(folder, out, output)
    wait_until((out / "log.jsonl").exists, process)
    began = time.monotonic()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(output.read_text())
    return Course(folder=folder, seconds=time.monotonic() - began)


def being_written(out: Path) -> bool:
    return any((out / "checkpoints").glob(".step-*"))


def torn_in(out: Path) -> str:
    """The first thing that is torn."""
    folders = sorted((out / "checkpoints").glob("step-*"))
    for name in ("last", "best"):
        named = pointed(out, name)
        if named is not None and named not in [folder.name for folder in folders]:
            return f"{name} names {named}, which is not there"
    try:
        for folder in folders:
            verify(folder)
    except ValueError as error:
        return str(error)
    return ""


def difference(out: Path, whole: Path) -> str:
    """The first line or file in which a run differs from another; empty: they are the same."""
    for line, other in zip(read_log(out), read_log(whole), strict=True):
        if line != other:
            return f"{line} is not {other}"
    ours, theirs = (read_json(r / "checkpoints" / str(pointed(r, "last")) / "manifest.json")
                    for r in (out, whole))  # fmt: skip
    differing = [name for name in theirs if ours[name] != theirs[name] and name != "config.yaml"]
    return ", ".join(differing)  # config.yaml names the run folder


# Strikes ----------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make `folder` a disk of its own; False where the system does not permit it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill_disk(process: BaseProcess, disk: Path, rng: random.Random) -> None:
    """Leave a random part of what a checkpoint takes; or, without a disk, of its largest file."""
    pid = pid_of(process)
    if not os.path.ismount(disk):
        limit = (rng.randrange(30_000), resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        return
    os.kill(pid, signal.SIGSTOP)  # so that the free space is known
    try:
        stat = os.statvfs(disk)
        size = stat.f_bavail * stat.f_frsize - rng.randrange(150_000)
        with (disk / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, max(size, 1))
    finally:
        os.kill(pid, signal.SIGCONT)


def has_victim(kind: str, process: BaseProcess) -> bool:
    return kind != "worker" or bool(workers_of(process))


def strike(kind: str, process: BaseProcess, disk: Path, rng: random.Random) -> bool:
    """Whether there was something to strike: a process or its workers may just have ended."""
    try:
        if kind == "disk":
            fill_disk(process, disk, rng)
        else:
            victims = workers_of(process) if kind == "worker" else [pid_of(process)]
            os.kill(rng.choice(victims), signal.SIGTERM if kind == "term" else signal.SIGKILL)
    except (ProcessLookupError, IndexError):
        return False
    return True


def wrong_end(kind: str, exitcode: int | None, out: Path, said: str) -> str:
    """What the process said, where that is not what docs/crashes.md promises."""
    promised = {
        "kill": (-signal.SIGKILL, ""),
        "term": (EXIT_STATUS, "stopped by SIGTERM after step"),
        "disk": (1, "not written"),
        "worker": (1, "a process that loads data died"),
    }
    status, message = promised[kind]
    # Python tells of what torch's handler of SIGCHLD raised in a callback, and goes on
    ended_by = said.count("Traceback") - said.count("Exception ignored in")
    clear = ended_by == 0 and said.count("\nerror: ") == (kind in ("disk", "worker"))
    hint = kind == "kill" or "the same command with --resume continues from" in said
    saved = kind != "term" or pointed(out, "last") == f"step-{read_log(out)[-1]['step']:06d}"
    right = exitcode == status and message in said and clear and hint and saved
    return "" if right else f"exit status {exitcode}: {said[-1000:]}"


def trial(kind: str, course: Course, disk: Path, rng: random.Random, while_writing: bool) -> Outcome | None:
    """Strike a run, judge, resume, compare; None where it had ended before it felt the strike."""
    out, output = disk / "run", course.folder / f"{kind}.txt"
    num_workers = int(kind in ("kill", "worker"))
    process = run(course.folder, out, output, f"data.num_workers={num_workers}")
    wait_until((out / "log.jsonl").exists, process)
    process.join(rng.uniform(0, 0.9 * course.seconds))
    if while_writing:
        # workers end before the stage does: they read ahead
        wait_until(lambda: being_written(out) and has_victim(kind, process), process)
        process.join(rng.uniform(0, 0.02))
    writing, workers = being_written(out), workers_of(process)
    struck = strike(kind, process, disk, rng)
    process.join()
    if not struck or process.exitcode == 0:
        return None
    said = output.read_text()
    if kind in ("kill", "disk"):  # what there was to be seen afterwards is exact
        writing = being_written(out) or "checkpoint step" in said
    torn, end = torn_in(out), wrong_end(kind, process.exitcode, out, said)
    end = end or ("a data worker outlived the run" if outlived_by(workers) else "")
    (disk / "ballast").unlink(missing_ok=True)
    process = run(course.folder, out, output, "--resume")
    process.join()
    unequal = output.read_text() if process.exitcode else difference(out, course.unbroken)
    return Outcome(writing=writing, torn=torn or torn_in(out), unequal=unequal, wrong_end=end)


def trials(kind: str, number: int, course: Course, seed: int) -> Iterator[Outcome]:
    """Outcomes of so many strikes; a run that had ended before does not count."""
    rng, disk, made = random.Random(f"{kind} {seed}"), course.folder / kind, 0
    while made < number:
        with small_disk(disk) if kind == "disk" else plain_folder(disk):
            outcome = trial(kind, course, disk, rng, while_writing=made % 2 == 0)
        shutil.rmtree(disk)
        if outcome is not None:
            made += 1
            yield outcome


@contextmanager
def plain_folder(folder: Path) -> Iterator[bool]:
    folder.mkdir()
    yield True


# Report -----------------------------------------------------------------------------------------


def row(kind: str, outcomes: list[Outcome]) -> list[str]:
    def count(what: str) -> str:
        return str(sum(bool(getattr(outcome, what)) for outcome in outcomes))

    return [kind, str(len(outcomes)), *map(count, ("writing", "torn", "unequal", "wrong_end"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, as far as clocks agree")
    arguments = parser.parse_args()
    table = Table(title="crash trials")
    for column in ("kind", "trials", "while writing", "torn", "unequal", "wrong end"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    faults: list[str] = []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a hundred fsyncs a run
    with tempfile.TemporaryDirectory(dir=memory) as folder, Progress() as bar:
        course = make_course(Path(folder))
        for kind in arguments.kinds:
            made = trials(kind, arguments.trials, course, arguments.seed)
            outcomes = list(bar.track(made, total=arguments.trials, description=kind))
            table.add_row(*row(kind, outcomes))
            bar.console.print(" ".join(row(kind, outcomes)))  # a cut-off run keeps these
            faults += [f for o in outcomes for f in (o.torn, o.unequal, o.wrong_end) if f]
    Console().print(table)
    print(*faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
