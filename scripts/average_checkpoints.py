"""Average the trained parts of a run over some of its steps: SWA (Izmailov et al. 2018).

    python scripts/average_checkpoints.py run=runs/demo last=3 out=runs/demo-swa
    python scripts/average_checkpoints.py run=runs/demo steps=[100,200] decay=0.5 out=OUT
    python eval.py --checkpoint OUT;  python scripts/merge.py run=OUT out=MERGED

Experts, router and projector are averaged; OUT loads like any step folder. A run keeps as many steps as its
`train.keep_last`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from moa.merging.averaging import average_steps, choose_steps
from moa.settings import describe, load


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    run: str | None = None  # run folder
    steps: list[int] = field(default_factory=list)  # its steps to average
    last: int | None = None  # or the newest so many
    decay: float = 1.0  # 1: the plain mean; below: a step weighs this much of the next one
    out: str | None = None  # folder to write


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{describe(AverageConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of the settings below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    args = parser.parse_intermixed_args(argv)
    try:
        average(load(AverageConfig, args.config, args.overrides), Console())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def average(settings: AverageConfig, console: Console) -> None:
    if settings.run is None or settings.out is None:
        raise ValueError("run, out: each names a folder")
    folders = choose_steps(settings.run, settings.steps, settings.last)
    report = average_steps(settings.out, folders, decay=settings.decay)
    for step, weight in zip(report["steps"], report["weights"], strict=True):
        console.print(f"{weight:.3f}  {step}")
    console.print(f"{len(report['files'])} files averaged: {settings.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
