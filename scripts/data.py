"""Look at data before training on it.

    python -m scripts.data check config=configs/demo.yaml workers=2
    python -m scripts.data check source.path=my/train.jsonl
    python -m scripts.data check source.format=pope source.path=coco_pope_random.json source.images=val2014
    python -m scripts.data preview config=configs/demo.yaml out=page.html num_samples=12

`check` reads every row of every source as a run would, and prints what is wrong by source and
reason, with the first rows of each; it exits with 1 where something is, and with 2 for settings that
cannot be used. `preview` writes a page of samples as the model sees
them. Other keys than the ones below are the run's: data.tasks=[vqa] prompt.box_codec=llava
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data.config import SourceConfig
from moa.cli.command import mistakes_in_one_line
from moa.cli.ranges import Count, FilePath, Seed, Size
from moa.cli.settings import describe, load
from moa.config import RunConfig, load_config

if TYPE_CHECKING:
    from data.audit import Audit
    from data.collate import Collator
    from data.mixture import Source

PARTS = ("data.sources", "data.validation", "eval.sources")


@dataclass(frozen=True, kw_only=True)
class Settings:
    config: FilePath | None = None  # a run's YAML, whose data sets are read
    source: SourceConfig | None = None  # one data set, instead of a run's config
    only: list[str] | None = None  # names of the sources to look at; null: all
    limit: Count | None = None  # rows of each source; null: all
    workers: Size = 1  # of check: processes
    show: Count = 3  # of check: rows that are printed of each reason
    ignore: list[str] = field(default_factory=list)  # of check: reasons that are no error
    out: FilePath = "preview.html"  # of preview: the page
    num_samples: Count = 3  # of preview: samples of each source
    seed: Seed = 0  # of preview: another one shows other samples
    progress: bool = True  # of check: progress bar

    def __post_init__(self) -> None:
        for reason in self.ignore:
            from data.audit import REASONS

            if reason not in REASONS:
                raise ValueError(f"ignore: no reason {reason!r}; choices: {', '.join(REASONS)}")
        if self.only == []:
            raise ValueError("only: names no source")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="settings, with their defaults:\n\n" + describe(Settings),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("check", "preview"))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_args(argv)


def read_settings(arguments: list[str]) -> tuple[Settings, RunConfig, bool]:
    """Settings, the run's config, and whether it is a run's (its tasks and experts are known)."""
    own = {item.name for item in fields(Settings)}
    keys = {text: text.partition("=")[0].partition(".")[0] for text in arguments}
    mine = [text for text in arguments if keys[text] in own]
    rest = [text for text in arguments if keys[text] not in own]
    lone = ["source.format=jsonl"] if "source" in keys.values() else []
    settings = load(Settings, None, [*lone, *mine])
    if (settings.config is None) == (settings.source is None):
        raise ValueError("give either config=FILE, that of a run, or source.path=FILE")
    if settings.source is None:
        return settings, load_config(settings.config, rest), True
    source = {k: v for k, v in asdict(settings.source).items() if v is not None}
    entry = yaml.safe_dump({source.pop("name"): source}, default_flow_style=True, width=10**6)
    config = load_config(None, ["experts={any: {}}", f"data.sources={entry}", *rest])
    return settings, config, False


def collator_of(config: RunConfig, known: bool) -> "Collator":
    """The run's own; a lone source may have tasks that no config names."""
    from data.sources import make_collator
    from moa.build import intake_of

    return make_collator(config, intake_of(config.model), allow_unknown_tasks=not known)


def chosen(config: RunConfig, only: list[str] | None) -> dict[str, list[SourceConfig]]:
    """Part of the config -> its sources; each data set once, however many parts it is in."""
    parts = (config.data.sources, config.data.validation, config.eval.sources)
    names = dict.fromkeys(name for part in parts for name in part)
    for name in only or ():
        if name not in names:
            raise ValueError(f"only: no source {name!r}; choices: {', '.join(names)}")
    found: dict[str, list[SourceConfig]] = {}
    for key, part in zip(PARTS, parts, strict=True):
        fresh = [s for s in part.values() if s not in sum(found.values(), [])]
        found[key] = [s for s in fresh if only is None or s.name in only]
    return found


def opened(config: RunConfig, settings: Settings) -> "dict[str, dict[str, Source]]":
    """Part -> name -> data set. OCR words come from the cache alone: nothing is read live."""
    from data.sources import open_ocr, open_sources
    from moa.evaluation.settings import check_sources

    data = replace(config.data, ocr_engine=False)
    has_words = data.ocr_cache is not None and Path(data.ocr_cache).is_file()
    ocr = open_ocr(data) if has_words else None
    check_sources(config.eval.sources.values())
    parts = chosen(config, settings.only)
    return {key: open_sources(part, data, ocr) for key, part in parts.items()}


def check(settings: Settings, config: RunConfig, known: bool, console: Console) -> int:
    """Print the table; the number of rows with an error that is not ignored."""
    from data.audit import find_leaks

    parts, collator = opened(config, settings), collator_of(config, known)
    audits: dict[str, list[Audit]] = {}
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[speed]} rows/s"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not settings.progress, transient=True) as bar:
        for key, sources in parts.items():
            needs_answer = key == PARTS[0]
            judge = replace(collator, allow_unknown_tasks=not (known and needs_answer))
            audits[key] = list(audit_all(sources, judge, settings, bar))
    for held_out in audits[PARTS[1]] + audits[PARTS[2]]:
        find_leaks(audits[PARTS[0]], held_out)
    seconds = time.perf_counter() - began
    console.print(table_of(audits, settings.ignore))
    for line in examples(audits, settings.show):
        console.print(line, markup=False)
    every = sum(audits.values(), [])
    total, found = sum(a.rows for a in every), [pair for a in every for pair in a.found.items()]
    errors = sum(finding.count for rule, finding in found if rule not in settings.ignore)
    speed = f"{total / seconds:,.0f} rows/s, {settings.workers} processes"
    console.print(f"{total:,} rows in {seconds:.1f} s ({speed}), {errors:,} errors")
    return errors


def audit_all(
    sources: "Mapping[str, Source]", collator: "Collator", settings: Settings, bar: Progress
) -> "Iterator[Audit]":
    from data.audit import audit_source

    for name, source in sources.items():
        rows = len(source) if settings.limit is None else min(settings.limit, len(source))
        task, began = bar.add_task(name, total=rows, speed="-"), time.perf_counter()

        def advance(count: int, task: Any = task, began: float = began) -> None:
            bar.advance(task, count)
            speed = bar.tasks[task].completed / (time.perf_counter() - began)
            bar.update(task, speed=f"{speed:,.0f}")

        yield audit_source(source, name, collator, limit=settings.limit, workers=settings.workers, advance=advance)


def table_of(audits: "Mapping[str, list[Audit]]", ignore: list[str]) -> Table:
    table = Table(title="what is wrong, by source and reason")
    for column in ("part", "source", "rows", "reason", "count"):
        table.add_column(column, justify="right" if column in ("rows", "count") else "left")
    for key, part in audits.items():
        for audit in part:
            head = (key, audit.name, f"{audit.rows:,}")
            if not audit.found:
                table.add_row(*head, "-", "0")
            for rule, finding in audit.found.items():
                reason = f"{rule} (ignored)" if rule in ignore else rule
                table.add_row(*head, reason, f"{finding.count:,}")
                head = ("", "", "")
    return table


def examples(audits: "Mapping[str, list[Audit]]", show: int) -> Iterator[str]:
    """The first rows of each kind, as a run would name them."""
    for part in audits.values():
        for audit in part:
            for rule, finding in audit.found.items():
                yield from (f"  {example}" for example in finding.examples[:show])
                if finding.count > show:
                    yield f"  ... {finding.count:,} of {audit.name!r} in all: {rule} (show={show})"


def preview(settings: Settings, config: RunConfig, known: bool, console: Console) -> None:
    """Write the page: some samples of each source, picked at random by the seed."""
    from data.mixture import read_sample, shuffle
    from moa.analysis.preview_page import preview_page
    from moa.files.atomic import write_file

    parts, collator = opened(config, settings), collator_of(config, known)
    sources = [pair for part in parts.values() for pair in part.items()]
    items = []
    for name, source in sources:
        size = len(source) if settings.limit is None else min(settings.limit, len(source))
        picks = shuffle(size, settings.seed)[: settings.num_samples]
        items += [read_sample(source, int(pick), name) for pick in picks]
    judge = replace(collator, allow_unknown_tasks=True)
    title = f"{len(items)} samples as {Path(config.model.name).name} sees them"
    write_file(settings.out, preview_page(items, judge, title))
    console.print(f"{settings.out}: {len(items)} samples of {len(sources)} sources")


def main(argv: Sequence[str] | None = None) -> None:
    arguments, console = parse_arguments(argv), Console(highlight=False, soft_wrap=True)
    with mistakes_in_one_line():
        settings, config, known = read_settings(arguments.settings)
        if arguments.command == "preview":
            preview(settings, config, known, console)
            return
        errors = check(settings, config, known, console)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
