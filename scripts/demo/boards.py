"""Do mixtures pay? Train and score the rows of a board, and write its table, its picture and its claims.

    python -m scripts.demo.boards board=together out=runs/boards seeds=[0,1,2,3,4] jobs=2
    python -m scripts.demo.boards board=all only=[lora,experts] steps=0.01 num_samples=4 seeds=[0] results=/tmp/dry

configs/boards/NAME.yaml holds the rows of a board. Rows are trained and scored seed by seed, `jobs` at a time with one
thread each. After each, results/board_NAME.md, .json, .png and .npz (scores by question) and results/boards.json
(claims) show what is done. A killed board continues where it stopped; what exists is not made again.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, CountOrZero, FilePath, Seed, ShareAboveZero
from moa.cli.settings import check

if TYPE_CHECKING:
    from scripts.demo.board.kept import Kept
    from scripts.demo.board.plan import Cell, Plan


@dataclass(frozen=True, kw_only=True)
class BoardsSettings:
    board: str = "all"  # file in configs/boards without .yaml; all: each of them
    out: FilePath = "runs/boards"  # runs and scores
    results: FilePath = "results"  # folder of tables, pictures and claims
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    jobs: Count = 2  # rows at a time, each in its own processes with one thread
    # rows to train and score, with what they start from: ROW of every board or BOARD/ROW; null: all
    only: list[str] | None = None
    # questions of every column, and most of every validation set; null: the board's
    num_samples: Count | None = None
    steps: ShareAboveZero = 1.0  # share of every stage's steps: small for a dry run
    # of every run's config: [train.batch_size=8]
    overrides: list[str] = field(default_factory=list)
    dry: bool = False  # print what is to be done and about how long it takes, and stop
    lock: CountOrZero | None = None  # file number that keeps others out of `out`; set by the command itself
    cell: list[str] | None = None  # [tune or row, BOARD, ROW, SEED]: this alone, as a process of its own

    def __post_init__(self) -> None:
        differ = len(set(self.seeds)) == len(self.seeds) and bool(self.seeds)
        check(differ, "seeds", f"must be some that all differ, got {self.seeds}")
        whole = self.steps == 1 and self.num_samples is None and not self.overrides
        rule = "holds whole runs; name another folder beside steps, num_samples or overrides"
        check(whole or Path(self.results).resolve() != Path("results").resolve(), "results", rule)


def run_boards(settings: BoardsSettings, console: Console) -> None:
    from scripts.demo.board.federated import score_federation
    from scripts.demo.board.kept import read_kept
    from scripts.demo.board.plan import Cell, Plan, board_names, read_board
    from scripts.demo.board.scoring import score
    from scripts.demo.board.training import making, tune

    options: dict[str, Any] = {"steps": settings.steps, "num_samples": settings.num_samples}
    plan = Plan(out=Path(settings.out).resolve(), overrides=tuple(settings.overrides), **options)
    if settings.cell is not None:
        what, board, row, seed = settings.cell
        cell = Cell(board, row, int(seed))
        if what == "tune":
            return tune(plan, cell)
        if weights := making(plan, cell):
            weights.do()
        if read_board(board).rows[row].scored:
            (score_federation if read_board(board).partitions else score)(plan, cell)
        return None
    boards = board_names() if settings.board == "all" else [settings.board]
    jobs = jobs_of(plan, boards, settings)
    kept = {board: read_kept(Path(settings.results), board) for board in {job.cell.board for job in jobs}}
    finished = set[Job]()
    for job in in_order(jobs):
        if finished.issuperset(needs_of(job)) and is_done(plan, job, kept[job.cell.board]):
            finished.add(job)
    in_results = {j for j in jobs if j.what == "row" and kept[j.cell.board].has(plan, j.cell)}
    todo = to_do(jobs, finished, in_results)
    console.print(estimate(plan, todo, settings.jobs), highlight=False, soft_wrap=True)
    if settings.dry:
        return
    with alone_in(plan.out) as lock:
        settings = replace(settings, lock=lock)
        work(plan, boards, jobs, todo, finished, settings, console)


def work(
    plan: "Plan",
    boards: Sequence[str],
    jobs: Sequence["Job"],
    todo: Sequence["Job"],
    finished: set["Job"],
    settings: BoardsSettings,
    console: Console,
) -> None:
    """Read the images, run what is to be done, and write all tables."""
    from scripts.demo.board.scoring import read_images
    from scripts.demo.board.table import write_board

    read_images(plan, [*dict.fromkeys(job.cell.board for job in jobs)], settings.jobs)
    failed = run_jobs(plan, todo, finished, settings, console)
    for board in boards:
        console.print(write_board(plan, board, settings.seeds, Path(settings.results)), soft_wrap=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} failed or wait for one that did: {', '.join(map(str, failed))}")


@contextmanager
def alone_in(out: Path) -> Iterator[int]:
    """A lock that jobs inherit; ValueError where another command, or a job of one that was killed, works in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out: another command works in {out}") from None
        yield file.fileno()


@dataclass(frozen=True)
class Job:
    """Tune a row, or train and score it at one seed."""

    what: str
    cell: "Cell"

    def __str__(self) -> str:
        return f"tune {self.cell.board}/{self.cell.row}" if self.what == "tune" else str(self.cell)


def jobs_of(plan: "Plan", boards: Sequence[str], settings: BoardsSettings) -> list[Job]:
    """All jobs in the order of their start: tuning first, then seed by seed; each after those that it needs."""
    from scripts.demo.board.plan import Cell, read_board, with_needed

    def names_of(board: str, row: str) -> set[str]:
        return {own if whole else f"{board}/{own}" for own in (row, row.partition("@")[0]) for whole in (True, False)}

    for row in settings.only or ():
        known = {name for board in boards for row in read_board(board).rows for name in names_of(board, row)}
        check(row in known, "only", f"no row {row!r}; choices: {', '.join(sorted(known))}")
    wanted = [
        Cell(board, row, seed)
        for number, seed in enumerate(settings.seeds)
        for board in boards
        for row, own in read_board(board).rows.items()
        if (own.seeds is None or number < own.seeds)
        and (own.scored or own.arrivals)
        and (settings.only is None or not names_of(board, row).isdisjoint(settings.only))
    ]
    found: dict[Job, None] = {}
    for cell in with_needed(wanted):
        for job in before(cell):
            found[job] = None
        found[Job("row", cell)] = None
    return sorted(found, key=lambda job: job.what != "tune")


def before(cell: "Cell") -> list[Job]:
    """The jobs whose results a row needs, those that they need before them."""
    from scripts.demo.board.plan import Cell, needed, read_board

    board = read_board(cell.board)
    row = board.rows[cell.row]
    found = [job for other in needed(cell) for job in (*before(other), Job("row", other))]
    if board.tune is not None and row.trains:
        at_seed = Cell(cell.board, row.tune_as or cell.row, board.tune.seed)
        found += [job for other in needed(at_seed) for job in (*before(other), Job("row", other))]
        found.append(Job("tune", at_seed))
    return found


def needs_of(job: Job) -> list[Job]:
    from scripts.demo.board.plan import needed

    if job.what == "row":
        return before(job.cell)
    return [Job("row", other) for other in needed(job.cell)]


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """Each after those that it needs."""
    found: dict[Job, None] = {}
    for job in jobs:
        for other in needs_of(job):
            found[other] = None
        found[job] = None
    return [*found]


def to_do(jobs: Sequence[Job], finished: set[Job], in_results: set[Job]) -> list[Job]:
    """What is neither here nor in the results, and whatever that needs and is not here."""
    found: dict[Job, None] = {}

    def add(job: Job) -> None:
        if job not in finished and job not in found:
            for other in needs_of(job):
                add(other)
            found[job] = None

    needed_by_rows = {other for job in jobs if job.what == "row" for other in needs_of(job)}
    for job in jobs:
        if job not in in_results and (job.what == "row" or job not in needed_by_rows):
            add(job)
    return sorted(found, key=lambda job: (job.what != "tune", jobs.index(job) if job in jobs else -1))


def is_done(plan: "Plan", job: Job, kept: "Kept") -> bool:
    """ValueError where what is there was made with other settings."""
    from scripts.demo.board.kept import restore_rate
    from scripts.demo.board.plan import read_board
    from scripts.demo.board.scoring import is_scored
    from scripts.demo.board.training import is_tuned, making

    if job.what == "tune":
        return is_tuned(plan, job.cell) or restore_rate(plan, job.cell, kept)
    weights, row = making(plan, job.cell), read_board(job.cell.board).rows[job.cell.row]
    return (weights is None or weights.is_done()) and (not row.scored or is_scored(plan, job.cell))


# On one thread of the machine that made results/; a step is one of 24 samples.
STEP_SECONDS, QUESTION_SECONDS, START_SECONDS, BATCH = 0.55, 0.018, 25.0, 24


def estimate(plan: "Plan", jobs: Sequence[Job], side_by_side: int) -> str:
    """How many jobs are left, and about how many minutes they take."""
    from moa.federated.config import FederateConfig
    from scripts.demo.board.plan import read_board
    from scripts.demo.board.training import config_of

    seconds = 0.0
    for job in jobs:
        board = read_board(job.cell.board)
        row = board.rows[job.cell.row]
        if row.trains:
            config = config_of(job.cell.board, job.cell.row, plan.overrides)
            steps = plan.steps * sum(stage.steps for stage in config.stages.values())
            if isinstance(config, FederateConfig) and not row.pooled:
                steps *= config.federated.rounds * config.federated.drawn
            steps *= config.train.batch_size / BATCH
            runs = len(board.tune.rates) * board.tune.steps if board.tune and job.what == "tune" else 1.0
            seconds += runs * steps * STEP_SECONDS + START_SECONDS
        if job.what == "row" and row.scored:
            seconds += START_SECONDS + QUESTION_SECONDS * sum(
                column.num_samples or 0 for column in plan.columns(job.cell.board).values()
            )
    rows, tunings = (sum(job.what == what for job in jobs) for what in ("row", "tune"))
    minutes = seconds / side_by_side / 60
    return f"{rows} rows to score, {tunings} to tune: about {minutes:.0f} minutes, {side_by_side} at a time"


def run_jobs(
    plan: "Plan", jobs: Sequence[Job], done: set[Job], settings: BoardsSettings, console: Console
) -> list[Job]:
    """Run every job when those that it needs are done, and write the tables after each; the jobs that failed."""
    from scripts.demo.board.table import write_board

    waiting, failed, number = [*jobs], list[Job](), len(jobs) + len(done)
    running: dict[Future[int], Job] = {}
    began = time.monotonic()
    with ThreadPoolExecutor(settings.jobs) as pool:
        while waiting or running:
            for job in [*waiting]:
                needs = needs_of(job)
                if any(other in failed for other in needs):
                    waiting.remove(job)
                    failed.append(job)
                elif len(running) < settings.jobs and done.issuperset(needs):
                    waiting.remove(job)
                    running[pool.submit(run_job, job, settings)] = job
            if not running:
                continue
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                minutes = (time.monotonic() - began) / 60
                if status := future.result():
                    failed.append(job)
                    console.print(f"{minutes:.0f} min  {job}  failed with status {status}", highlight=False)
                    continue
                done.add(job)
                console.print(f"{minutes:.0f} min  {job}  ({len(done)} of {number})", highlight=False)
                write_board(plan, job.cell.board, settings.seeds, Path(settings.results))
    return failed


def run_job(job: Job, settings: BoardsSettings) -> int:
    """The exit status of one job in a process of its own, which prints why it failed."""
    keys = ("out", "results", "num_samples", "steps", "overrides")
    cell = [job.what, job.cell.board, job.cell.row, str(job.cell.seed)]
    given = {key: getattr(settings, key) for key in keys} | {"cell": cell}
    arguments = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    command = [sys.executable, "-m", "scripts.demo.boards", *arguments]
    inherited = () if settings.lock is None else (settings.lock,)
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, pass_fds=inherited).returncode


main = command(BoardsSettings, run_boards, __doc__)

if __name__ == "__main__":
    main()
