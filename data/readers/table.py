"""Opens a source by its format; a reader becomes one by a line above its function, in any file of this folder:

    @reads("vqav2", may=("annotations",))      source's config -> Records
    @parses("stvqa", at="data")                source's config, row of one JSON file -> Record

The line names the keys of the config that the format needs (path and images by default) and may use, so that a
forgotten file or a setting without effect is one clear error, and the defaults of its samples.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from data.checks import one_line
from data.config import SourceConfig
from data.ocr import OcrSource
from data.readers.names import readers
from data.readers.record import Record, RecordDataset, Records
from data.readers.rows import JsonRows, Row, Rows

SOME_USE = ("path", "images", "annotations", "ocr", "columns", "one_per", "style", "seed")
DEFAULTS = {field.name: field.default for field in fields(SourceConfig)}
Read = TypeVar("Read", bound=Callable[[SourceConfig], Records])
Parse = TypeVar("Parse", bound=Callable[[SourceConfig, Row], Record])
FILE = ("path",)
FOUR = ("path", "annotations", "images", "split")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A reader, the config keys that it needs and may use, and what its samples are by default."""

    read: Callable[[SourceConfig], Records]
    needs: tuple[str, ...] = ("path", "images")
    may: tuple[str, ...] = ()
    task: str = "vqa"
    prompt: str = "{question}"
    instruction: str = ""


FORMATS: dict[str, Format] = {}  # those of the readers that are imported


def reads(name: str, **row: Any) -> Callable[[Read], Read]:
    def add(read: Read) -> Read:
        FORMATS[name] = Format(read=read, **row)
        return read

    return add


def parses(
    name: str, *, rows: Callable[..., Rows] = JsonRows, at: str | None = None, **row: Any
) -> Callable[[Parse], Parse]:
    """`rows` opens the source's file; `at` is the member of its object that holds the rows, None: the file itself."""

    def add(parse: Parse) -> Parse:
        @reads(name, **row)
        def read(source: SourceConfig) -> Records:
            opened = rows(source.path, at=at) if at else rows(source.path)
            return Records(rows=opened, parse=partial(parse, source))

        return parse

    return add


def format_called(name: str) -> Format:
    import_module(readers()[name])
    return FORMATS[name]


def open_records(source: SourceConfig, expert: str | None, ocr: OcrSource | None = None) -> RecordDataset:
    """The data set of a source; ValueError, naming its key, for files that are missing or of another form."""
    chosen = format_called(source.format)
    key = f"data.sources.{source.name}"
    check_keys(source, chosen, key)
    prompt = chosen.prompt if source.prompt is None else source.prompt
    # `{}` is the place of the class name in CLIP's templates
    for place in re.findall(r"\{\w+\}", prompt):
        if place != "{question}":
            raise ValueError(f"{key}.prompt: {place} in {prompt!r} is not {{question}}")
    try:
        records = chosen.read(source)
    except ValueError as error:
        raise ValueError(one_line(f"{key}: format {source.format}: {error}")) from None
    if len(records) == 0:
        raise ValueError(f"{key}: {source.path} holds no rows")
    same: dict[str, Any] = {key: getattr(source, key) for key in ("task", "split", "num_samples")}
    same |= {"source": source.name, "default_task": chosen.task, "prompt": prompt, "expert": expert}
    how = chosen.instruction if source.instruction is None else source.instruction
    return RecordDataset(records=records, instruction=how, ocr=ocr, **same)


def check_keys(source: SourceConfig, chosen: Format, key: str) -> None:
    """ValueError for a key that the format needs and lacks, or that has no effect on it."""
    takes = (*chosen.needs, *chosen.may)
    for name in chosen.needs:
        if getattr(source, name) is None:
            raise ValueError(f"{key}.{name}: format {source.format} needs it: {', '.join(takes)}")
    for name in SOME_USE:
        if name not in takes and getattr(source, name) != DEFAULTS[name]:
            raise ValueError(f"{key}.{name}: has no effect with format={source.format}")
    if source.images is not None and not Path(source.images).is_dir():
        raise ValueError(f"{key}.images: no such folder: {source.images}")
