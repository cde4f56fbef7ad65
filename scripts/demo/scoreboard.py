"""Does routing pay? Train every row on the same data with the same steps, score all on the same questions.

    python -m scripts.demo.scoreboard out=runs/scoreboard seeds=[0,1,2] jobs=2 num_samples=64

Writes results/scoreboard.json, its table in Markdown and its chart. A killed scoreboard continues where it stopped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from rich.console import Console

from moa.cli.command import run_command
from moa.cli.ranges import Count, FilePath, Seed
from moa.config import check
from moa.files.atomic import write_file, write_json


@dataclass(frozen=True, kw_only=True)
class ScoreboardSettings:
    out: FilePath = "runs/scoreboard"  # runs and scores, a folder for each seed
    results: FilePath = "results"  # folder of the table, JSON and chart
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    jobs: Count = 1  # seeds at a time, each in its own process
    num_samples: Count = 128  # questions of each column
    # of every run's config: [train.batch_size=8]
    overrides: list[str] = field(default_factory=list)
    only_seed: Seed | None = None  # train and score this seed, and stop; null: all, and the table

    def __post_init__(self) -> None:
        check(self.num_samples >= 2, "num_samples", f"must be 2 or more, got {self.num_samples}")
        differ = len(set(self.seeds)) == len(self.seeds)
        check(differ, "seeds", f"must all differ, got {self.seeds}")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(ScoreboardSettings, make_board, __doc__, argv)


def make_board(settings: ScoreboardSettings, console: Console) -> None:
    from moa.analysis.plots import scoreboard_chart
    from scripts.demo.board.plan import ROOT, Column, Plan
    from scripts.demo.board.scoring import read_images, score_rows
    from scripts.demo.board.table import collect, markdown
    from scripts.demo.board.training import train_rows

    raw = yaml.safe_load((ROOT / "configs/scoreboard.yaml").read_text())
    columns = {name: Column(**column) for name, column in raw["columns"].items()}
    plan = Plan(
        out=Path(settings.out).resolve(),
        seed=settings.only_seed or 0,
        columns=columns,
        num_samples=settings.num_samples,
        overrides=list(settings.overrides),
    )
    if settings.only_seed is not None:
        train_rows(plan)
        return score_rows(plan)
    read_images(plan, num_workers=settings.jobs)
    with ThreadPoolExecutor(settings.jobs) as pool:
        codes = [*pool.map(lambda seed: run_seed(settings, seed), settings.seeds)]
    if any(codes):
        sys.exit(2)  # each seed that failed has printed why
    board = collect([replace(plan, seed=seed) for seed in settings.seeds])
    results, table = Path(settings.results), markdown(board, ["trained_mean", *columns])
    write_json(results / "scoreboard.json", board)
    write_file(results / "scoreboard.md", table)
    scoreboard_chart(results / "scoreboard.png", board)
    print(table)


def run_seed(settings: ScoreboardSettings, seed: int) -> int:
    """The exit status of one seed in a process of its own."""
    given = vars(settings) | {"only_seed": seed}
    arguments = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    threads = str(max(1, (os.cpu_count() or 1) // settings.jobs))
    command = [sys.executable, "-m", "scripts.demo.scoreboard", *arguments]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}).returncode


if __name__ == "__main__":
    main()
