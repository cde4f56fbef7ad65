"""Runs side by side: steps, losses and scores of all run folders below one, and the settings in which they differ.

    python -m scripts.runs            # those in runs/
    python -m scripts.runs runs/ablations

A federation has rounds in the column of steps. Scores are those that eval.py wrote of the run's own weights. A broken
or half-written folder is listed with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from moa.cli.command import mistakes_in_one_line, settings_parser
from moa.cli.ranges import FilePath
from moa.cli.settings import load

if TYPE_CHECKING:
    from moa.evaluation.runs import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunsSettings:
    folder: FilePath = "runs"  # searched for run folders, with all folders below; its name alone does too


def show(settings: RunsSettings, console: Console) -> None:
    from moa.evaluation.result import comparison
    from moa.evaluation.runs import find_runs, read_run

    folder = Path(settings.folder)
    if not folder.is_dir():
        raise ValueError(f"folder: no such folder: {folder}")
    runs = {path.relative_to(folder).as_posix(): read_run(path) for path in find_runs(folder)}
    if not runs:
        raise ValueError(f"folder: {folder} holds no run")
    runs = {folder.name if name == "." else name: run for name, run in runs.items()}
    console.print(overview(runs))
    scores = {
        f"{name}: {gates}" if gates else name: {one.name: one.score for one in found}
        for name, run in runs.items()
        for gates, found in run.measured().items()
    }
    if scores:
        console.print(comparison(scores))
    console.print(settings_table({name: run for name, run in runs.items() if run.config is not None}))
    for name, run in runs.items():
        for problem in run.problems:
            console.print(Text(f"{name}: {problem}"), soft_wrap=True)


def overview(runs: "dict[str, RunFolder]") -> Any:
    from moa.evaluation.result import plain_table

    grid = plain_table()
    for column in ("run", "steps", "loss", "validation", "problems"):
        grid.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for name, run in runs.items():
        done, planned, unit = run.progress
        of = "" if planned is None else f" of {planned}{'' if unit == 'steps' else f' {unit}'}"
        losses = (run.final("loss"), run.final("validation", last=1))
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        grid.add_row(Text(name), f"{done}{of}", *cells, str(len(run.problems) or ""))
    return grid


def settings_table(runs: "dict[str, RunFolder]") -> Any:
    """A row for each setting that is not the same everywhere; runs are columns, in as many tables as fit."""
    from moa.evaluation.result import WIDTH, chunks, plain_table
    from moa.evaluation.runs import differences

    found = differences([run.config for run in runs.values() if run.config is not None]) if len(runs) > 1 else {}
    if not found:
        return Group("", Text("No setting differs.") if len(runs) > 1 else "")
    most = max(map(len, found))
    widths = {name: 1 + min(24, max(len(name), *(len(v[i]) for v in found.values()))) for i, name in enumerate(runs)}
    grids: list[Any] = []
    for names in chunks(widths, WIDTH - most):
        grids.append(plain_table())
        for column in ("setting", *names):
            grids[-1].add_column(Text(column), overflow="fold")
        places = [[*runs].index(name) for name in names]
        for key, values in found.items():
            grids[-1].add_row(Text(key), *(Text(values[place]) for place in places))
    return Group("", Text("Settings that differ", style="bold"), *grids)


def main(argv: Sequence[str] | None = None) -> None:
    args = settings_parser(RunsSettings, __doc__).parse_intermixed_args(argv)
    given = [text if "=" in text else f"folder={text}" for text in args.overrides]
    with mistakes_in_one_line():
        show(load(RunsSettings, args.config, given), Console())


if __name__ == "__main__":
    main()
