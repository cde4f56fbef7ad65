"""Published mixtures as small files over any run: configs/presets/NAME.yaml, explained in docs/presets.md.

    python -m scripts.presets list
    python -m scripts.presets show hydralora                # what it is, what differs from the paper, its parameters
    python -m scripts.presets run hydralora train.batch_size=16
    python -m scripts.presets run hydralora config=my.yaml  # over a run of your own
    python -m scripts.presets run hydralora --resume        # or --overwrite, as of train.py
    python -m scripts.presets page                          # writes the table of docs/presets.md, with boards' scores

A file begins with a comment that is YAML: the fields of `Preset` below. Below it are settings of a run, and train.py
takes it like every file: `accelerate launch train.py --config RUN.yaml --config configs/presets/NAME.yaml`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moa.cli.command import mistakes_in_one_line
from moa.cli.settings import load
from moa.cli.strict_yaml import parse_yaml
from moa.config import RunConfig, load_config
from moa.files.atomic import write_file

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "presets"
PAGE, RESULTS = ROOT / "docs" / "presets.md", ROOT / "results"
HEAD, SCORES = ("preset", "paper", "what it does", "export", "what differs"), ("trained", "kept", "merged")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The comment that a file begins with."""

    paper: str  # its name, where it appeared, arXiv number
    does: str  # sites, experts, router and losses in words
    differs: str  # from the released code, and why
    over: str = "configs/demo.yaml"  # the run that it is tested over


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    if name not in names():
        raise ValueError(f"no preset {name!r}; choices: {', '.join(names())}")
    return FOLDER / f"{name}.yaml"


def read_preset(name: str) -> Preset:
    """The header of a preset; ValueError for one that is not these fields."""
    path = path_of(name)
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    try:
        fields = parse_yaml("\n".join(line.removeprefix("# ") for line in lines))
        return load(Preset, None, [*fields.items()] if isinstance(fields, dict) else [])
    except ValueError as error:
        raise ValueError(f"{path}: its first comment: {error}") from None


def config_of(name: str, run: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset over a run, by default the one that it is tested over."""
    return load_config([run or ROOT / read_preset(name).over, path_of(name)], overrides)


def exportable(config: RunConfig) -> str:
    """How one PEFT adapter can hold the mixture of a config."""
    router = config.router
    if any(expert.rank_gates != "none" or expert.kind != "lora" for expert in config.experts.values()):
        return "refused"
    if router.granularity != "sample":
        return "approximate"
    if router.row.learns is None:
        return "exact per task" if router.row.by_expert else "exact"
    return "exact per task" if router.evidence == ["task"] else "exact per sample"


def read_scores(results: Path = RESULTS) -> dict[str, list[str]]:
    """The cells of SCORES of each preset, in per cent, that a board has scored; `merged` is trained of its one LoRA."""
    found = dict[str, list[str]]()
    for file in (results / "presets.json", results / "presets_clip.json"):
        rows = json.loads(file.read_text())["rows"] if file.is_file() else {}
        for name in (name for name in rows if name in names()):
            one = rows.get(f"{name}@merged", {"means": {}})
            means = [rows[name]["means"].get("trained"), rows[name]["means"].get("kept"), one["means"].get("trained")]
            found[name] = [f"{mean['difference']:.1f}" if mean else "" for mean in means]
    return found


def row(name: str, config: RunConfig, scores: Mapping[str, Sequence[str]]) -> str:
    preset = read_preset(name)
    link = f"[`{name}`](../configs/presets/{name}.yaml)"
    own = scores.get(name, [""] * len(SCORES)) if scores else []
    return line_of([link, preset.paper, preset.does, exportable(config), *own, preset.differs])


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page_of(text: str, scores: Mapping[str, Sequence[str]]) -> str:
    """The page with its table as the presets and the boards' results have it."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| preset |"))
    head = [*HEAD[:-1], *(SCORES if scores else ()), HEAD[-1]]
    rows = [row(name, config_of(name), scores) for name in names()]
    after = [*takewhile(lambda line: line.startswith("|"), lines[first:])]
    lines[first : first + len(after)] = [line_of(head), "|" + "---|" * len(head), *rows]
    return "\n".join(lines) + "\n"


def count(config: RunConfig) -> dict[str, int]:
    """Numbers that learn in any stage, by part. A language model's weights are not loaded."""
    from moa.backbones.opening import class_of
    from moa.build import build_model
    from moa.planning.plan import FakeRun
    from moa.training.stages import parameter_groups

    compares = class_of(config.model.name).compares
    model = build_model(config) if compares else FakeRun(config, config.model.name).model
    groups = parameter_groups(model, config)
    return {part: sum({id(p): p.numel() for p in own.values()}.values()) for part, own in groups.items() if own}


def show_list(console: Console) -> None:
    table = Table("preset", "paper", "export", "over")
    for name in names():
        preset = read_preset(name)
        table.add_row(name, preset.paper, exportable(config_of(name)), preset.over)
    console.print(table)


def show(name: str, console: Console, run: str | None, overrides: Sequence[str]) -> None:
    preset, config = read_preset(name), config_of(name, run, overrides)
    console.print(f"{name}: {preset.paper}\n\n{preset.does}\n\ndiffers: {preset.differs}\n", soft_wrap=True)
    numbers = ", ".join(f"{part} {number:,}" for part, number in count(config).items())
    console.print(f"over {run or preset.over}: {numbers} parameters", soft_wrap=True)
    console.print(f"one adapter: {exportable(config)}\n\n{path_of(name).read_text()}", soft_wrap=True)


def run_preset(name: str, console: Console, run: str | None, overrides: Sequence[str], flags: Sequence[str]) -> None:
    """Train in one process; the line that is printed is the one for `accelerate launch`."""
    config_of(name, run, overrides)  # its mistakes before anything starts
    base = run or str(ROOT / read_preset(name).over)
    command = [str(ROOT / "train.py"), "--config", base, "--config", str(path_of(name)), *overrides, *flags]
    console.print(f"accelerate launch {' '.join(command)}", soft_wrap=True)
    sys.exit(subprocess.run([sys.executable, *command], check=False).returncode)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["list", "show", "run", "page"])
    parser.add_argument("name", nargs="?", help="file in configs/presets, without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config=RUN.yaml, and settings of the run")
    known = parser.add_mutually_exclusive_group()
    for flag in ("--resume", "--overwrite"):
        about = "for run: as of train.py"
        known.add_argument(flag, action="append_const", dest="flags", const=flag, default=[], help=about)
    args, console = parser.parse_intermixed_args(argv), Console()
    with mistakes_in_one_line():
        own = [text for text in args.overrides if text.startswith("config=")]
        rest = [text for text in args.overrides if text not in own]
        if args.flags and args.action != "run":
            raise ValueError(f"{args.flags[0]}: has no effect with {args.action}")
        if args.action == "list":
            show_list(console)
            return
        if args.action == "page":
            write_file(PAGE, page_of(PAGE.read_text(encoding="utf-8"), read_scores()))
            return
        if args.name is None:
            raise ValueError(f"{args.action}: name a preset; choices: {', '.join(names())}")
        run = own[-1].removeprefix("config=") if own else None
        if args.action == "show":
            show(args.name, console, run, rest)
        else:
            run_preset(args.name, console, run, rest, args.flags)


if __name__ == "__main__":
    main()
