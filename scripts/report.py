"""One page about a run: RUN/report.html, without a model and without a network.

    python -m scripts.report run=runs/demo

What was trained on what, losses, scores with intervals beside the base, one LoRA and merged adapters (of
scripts.summary) or other gates (of eval.py), gates by task, samples with answers and boxes, what merges keep, and what
it cost; of a federation rounds, and scores by client. A section whose files are not there is left out; what is broken
or belongs to other weights is named. eval.py writes the page too.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import FilePath


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    run: FilePath = ""  # run folder
    out: FilePath | None = None  # file of the page; null: RUN/report.html


def report(settings: ReportSettings, console: Console) -> None:
    from moa.evaluation.run_page import write_run_page
    from moa.evaluation.runs import MARKS

    run = Path(settings.run)
    if not settings.run or not any((run / mark).exists() for mark in MARKS):
        raise ValueError(f"run: {settings.run!r} is no run folder: it has none of {', '.join(MARKS)}")
    file, problems = write_run_page(run, Path(settings.out) if settings.out else None)
    console.print(f"report: {file}", soft_wrap=True)
    for problem in problems:
        console.print(f"  {problem}", soft_wrap=True, markup=False)


main = command(ReportSettings, report, __doc__)

if __name__ == "__main__":
    main()
