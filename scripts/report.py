"""One page about a run: RUN/report.html, without a model and without a network.

    python -m scripts.report run=runs/demo

What was trained on what, losses, scores with intervals beside the base, one LoRA and merged adapters (of
scripts.summary) or other gates (of eval.py), gates by task, samples with answers and boxes, what merges keep, and what
it cost. A section whose files are not there is left out; what is broken or belongs to other weights is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moa.cli.command import run_command
from moa.cli.ranges import FilePath
from moa.files.atomic import write_file


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    run: FilePath = ""  # run folder
    out: FilePath | None = None  # file of the page; null: RUN/report.html


def report(settings: ReportSettings, console: Console) -> None:
    from moa.evaluation.run_page import run_page
    from moa.evaluation.runs import MARKS, read_run

    run = Path(settings.run)
    if not settings.run or not any((run / mark).exists() for mark in MARKS):
        raise ValueError(f"run: {settings.run!r} is no run folder: it has none of {', '.join(MARKS)}")
    out = Path(settings.out) if settings.out else run / "report.html"
    found = read_run(run)
    write_file(out, run_page(found))
    console.print(f"report: {out}", soft_wrap=True)
    for problem in found.problems:
        console.print(f"  {problem}", soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(ReportSettings, report, __doc__, argv)


if __name__ == "__main__":
    main()
