"""Rows of a file, one at a time and by number: JSON, JSON lines, tables, short lists.

Every row has its place, which errors name. One row may hold several samples:
`rows[i]` is the row of sample i and the sample's number in it.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data.checks import BadSampleError
from data.readers.index import Scanner, cached, key_bytes, scan_csv, scan_json, scan_lines


class Row(NamedTuple):
    """`part` is the sample's number in the row, `key` the row's key where its file is an object."""

    value: Any
    where: str
    part: int = 0
    key: str = ""


class Rows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


def require_file(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such data file")
    return Path(path)


def text_lines(path: str | Path) -> list[str]:
    """The lines of a small text file; only a line feed ends one, as captions hold other breaks."""
    try:
        text = require_file(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}; save it as UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_bytes(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def read_span(path: Path, start: int, end: int, where: str) -> Any:
    """The JSON value between two bytes of a file."""
    try:
        return json.loads(read_bytes(path, start, end))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, endless brackets
        raise BadSampleError(where, "unreadable row", f"not JSON: {error}") from None


def read_json(path: str | Path) -> Any:
    """The value of a small JSON file."""
    file = require_file(path)
    return read_span(file, 0, file.stat().st_size, str(file))


class JsonRows:
    """The rows of a JSON list or object: the file itself, or its member `at`.

    `key` is the field that `one` and `all` look rows up by (an object's own keys where it is None). `count` is the
    number of samples in a row (0: it is left out); `about` must name what `count` depends on, since the index is kept.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        at: str | None = None,
        key: str | None = None,
        count: Callable[[Any], int] | None = None,
        about: str = "",
    ):
        self.path, self.at, self.key = require_file(path), at, key
        build = partial(scan_json, self.path, at=at, key=key, count=count)
        index = cached(self.path, f"json {at} {key} {about}", build)
        self.starts, self.ends, self.counts = index["starts"], index["ends"], index["counts"]
        self.keys = index.get("keys", np.zeros(0, "S1"))
        self.order = np.argsort(self.keys, kind="stable")
        self.sorted_keys = self.keys[self.order]
        self.last = np.cumsum(self.counts)  # number of the sample behind a row's last

    def __len__(self) -> int:
        return int(self.last[-1]) if len(self.last) else 0

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self.last, index, side="right"))
        return self.row(number, index - int(self.last[number] - self.counts[number]))

    def row(self, number: int, part: int = 0) -> Row:
        """A row by its place in the file, whatever its count."""
        named = self.key is None and len(self.keys) > 0
        key = self.keys[number].decode(errors="surrogatepass") if named else ""
        where = f"{self.path}: {self.at or ''}[{repr(key) if named else number}]"
        value = read_span(self.path, int(self.starts[number]), int(self.ends[number]), where)
        return Row(value, where, part, key)

    def all(self, key: Any) -> list[Row]:
        """Every row with this key, in the file's order."""
        wanted = key_bytes(key)
        first = int(np.searchsorted(self.sorted_keys, wanted, side="left"))
        behind = int(np.searchsorted(self.sorted_keys, wanted, side="right"))
        return [self.row(int(number)) for number in self.order[first:behind]]

    def one(self, key: Any) -> Any:
        """The value of the first row with this key; ValueError where there is none."""
        found = self.all(key)
        if not found:
            name = f"{self.key} {key!r:.60}" if self.key else f"{key!r:.60}"
            raise ValueError(f"{self.path} has no {name}{f' in {self.at}' if self.at else ''}")
        return found[0].value


class JsonLines:
    """One JSON value a line; blank lines do not count, and the first line is 1."""

    def __init__(self, path: str | Path):
        self.path = require_file(path)
        index = cached(self.path, "lines", partial(scan_lines, self.path))
        self.starts, self.ends, self.numbers = index["starts"], index["ends"], index["numbers"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        where = f"{self.path}:{self.numbers[index]}"
        start, end = int(self.starts[index]), int(self.ends[index])
        try:
            return Row(read_span(self.path, start, end, where), where)
        except BadSampleError as error:
            detail = f"{error.detail}; a row is one object a line"
            raise BadSampleError(where, error.rule, detail) from None


class CsvRows:
    """The rows of a CSV file as texts by the header's names, None where a cell is empty; the first row is 1."""

    def __init__(self, path: str | Path, delimiter: str):
        self.path, self.delimiter = require_file(path), delimiter
        index = cached(self.path, f"csv {delimiter}", partial(scan_csv, self.path, delimiter))
        self.starts, self.ends = index["starts"], index["ends"]
        if len(self.starts) == 0:
            raise ValueError(f"{path}: holds no header line of column names")
        self.columns = self.cells(0, f"{path}: header")
        twice = [name for name, count in Counter(self.columns).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: has the column {twice[0]!r} twice")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Row:
        where = f"{self.path}: row {index + 1}"
        cells = self.cells(index + 1, where)
        if len(cells) != len(self.columns):
            detail = f"has {len(cells)} cells, and the header {len(self.columns)}"
            raise BadSampleError(where, "unreadable row", detail)
        values = [cell or None for cell in cells]
        return Row(dict(zip(self.columns, values, strict=True)), where)

    def cells(self, number: int, where: str) -> list[str]:
        content = read_bytes(self.path, int(self.starts[number]), int(self.ends[number]))
        try:
            text = content.decode("utf-8-sig" if number == 0 else "utf-8")
            return next(csv.reader(StringIO(text, ""), delimiter=self.delimiter, strict=True))
        except UnicodeDecodeError as error:
            detail = f"not UTF-8: {error}; save the file as UTF-8"
        except csv.Error as error:
            detail = f"not CSV: {error}"
        raise BadSampleError(where, "unreadable row", detail)


def json_rows(path: str | Path) -> JsonRows | JsonLines:
    """A JSON list of rows, or one row a line: whichever the file begins as."""
    with require_file(path).open("rb") as file:
        is_list = Scanner(file, Path(path)).peek() == "["
    return JsonRows(path) if is_list else JsonLines(path)
