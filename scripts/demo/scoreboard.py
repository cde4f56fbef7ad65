"""Does routing pay? Train every row on the same data with the same steps, score all on the same questions.

    python -m scripts.demo.scoreboard --out runs/scoreboard [--seeds 0 1 2] [--jobs 2] [key.sub=value ...]

Writes results/scoreboard.json, its table in Markdown and its chart. Trained runs and scored rows lie in --out, one
folder a seed: a killed scoreboard continues where it stopped. `key.sub=value` changes every run's config. Scores
of other weights, questions or settings are measured again; runs that were trained with other settings are refused.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import yaml

from moa.analysis.plots import scoreboard_chart
from moa.cli.command import mistakes_in_one_line, path_argument
from moa.files.atomic import write_file, write_json
from scripts.demo.board.plan import ROOT, Column, Plan
from scripts.demo.board.scoring import read_pictures, score_rows
from scripts.demo.board.table import collect, markdown
from scripts.demo.board.training import train_rows


def run_seed(plan: Plan) -> None:
    train_rows(plan)
    score_rows(plan)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/scoreboard"), help="runs and scores by seed"
    )
    parser.add_argument(
        "--results", type=path_argument, default=Path("results"), help="table, JSON and chart"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time, each in its own process"
    )
    parser.add_argument("--num-samples", type=int, default=128, help="questions a column")
    parser.add_argument("--only-seed", type=int, help="train and score this seed, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="for every run")
    return parser.parse_intermixed_args()


def main() -> None:
    with mistakes_in_one_line():
        make_board(arguments())


def make_board(args: argparse.Namespace) -> None:
    if args.num_samples < 2 or args.jobs < 1 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError("--num-samples must be 2 or more, --jobs 1 or more, --seeds all different")
    raw = yaml.safe_load((ROOT / "configs/scoreboard.yaml").read_text())
    columns = {name: Column(**column) for name, column in raw["columns"].items()}
    plans = [
        Plan(out=args.out.resolve(), seed=seed, columns=columns, num_samples=args.num_samples,
             overrides=args.overrides)
        for seed in args.seeds
    ]  # fmt: skip
    if args.only_seed is not None:
        return run_seed(replace(plans[0], seed=args.only_seed))
    read_pictures(plans[0], num_workers=args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with ThreadPoolExecutor(args.jobs) as pool:
        commands = [
            [
                sys.executable,
                "-m",
                "scripts.demo.scoreboard",
                *sys.argv[1:],
                "--only-seed",
                str(p.seed),
            ]
            for p in plans
        ]
        codes = [*pool.map(lambda c: subprocess.run(c, env=environment).returncode, commands)]
    if any(codes):
        sys.exit(2)  # each seed that failed has said why
    board = collect(plans)
    write_json(args.results / "scoreboard.json", board)
    table = markdown(board, ["trained_mean", *columns])
    write_file(args.results / "scoreboard.md", table)
    scoreboard_chart(args.results / "scoreboard.png", board)
    print(table)


if __name__ == "__main__":
    main()
