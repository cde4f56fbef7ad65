"""How a reader becomes a format: one line above its function, in any file of this folder.

    @reads("vqav2", may=("annotations",))      source's config -> Records
    @parses("docvqa", at="data")               source's config, row of one JSON file -> Record

The line names the keys of the config that the format needs and may use, so that a forgotten file or a setting without
effect is one clear error, and the defaults of its samples. `needs` is path and images where it is not given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from data.readers.record import Record, Records
from data.readers.rows import JsonRows, Row
from moa.config import SourceConfig

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


def parses(name: str, *, at: str | None = None, **row: Any) -> Callable[[Parse], Parse]:
    """`at` is the member of the file's object that holds the rows; None is the file itself."""

    def add(parse: Parse) -> Parse:
        @reads(name, **row)
        def read(source: SourceConfig) -> Records:
            return Records(rows=JsonRows(source.path or "", at=at), parse=partial(parse, source))

        return parse

    return add
