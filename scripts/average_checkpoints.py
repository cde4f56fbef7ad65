"""Average the trained parts of a run over some of its steps: SWA (Izmailov et al. 2018).

    python -m scripts.average_checkpoints run=runs/demo last=3 out=runs/demo-swa
    python -m scripts.average_checkpoints run=runs/demo steps=[100,200] decay=0.5 out=OUT
    python eval.py run=OUT;  python -m scripts.merge run=OUT out=MERGED

Experts, router and projector are averaged; OUT loads like any step folder. A run keeps as many steps as its
`train.keep_last`.
"""

from dataclasses import dataclass, field

from rich.console import Console

from moa.cli.command import command
from moa.cli.ranges import Count, CountOrZero, FilePath, ShareAboveZero


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    run: FilePath | None = None  # run folder
    steps: list[CountOrZero] = field(default_factory=list)  # its steps to average
    last: Count | None = None  # or the newest so many
    decay: ShareAboveZero = 1.0  # 1: the plain mean; below: a step weighs this much of the next one
    out: FilePath | None = None  # folder to write


def average(settings: AverageConfig, console: Console) -> None:
    from moa.merging.checkpoints.averaging import average_steps, choose_steps

    if settings.run is None or settings.out is None:
        raise ValueError("run, out: each names a folder")
    folders = choose_steps(settings.run, settings.steps, settings.last)
    report = average_steps(settings.out, folders, decay=settings.decay)
    for step, weight in zip(report["steps"], report["weights"], strict=True):
        console.print(f"{weight:.3f}  {step}")
    console.print(f"{len(report['files'])} files averaged: {settings.out}", soft_wrap=True)


main = command(AverageConfig, average, __doc__)

if __name__ == "__main__":
    main()
