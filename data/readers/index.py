"""Where each row of a big file lies, so that one row can be read without the others.

    file  --one pass-->  byte offsets, keys, sample counts  -->  cache  -->  seek, read one row

A JSON file is read from front to back with one window of it in memory, as latin-1 text: one character a byte, so that a
position in the text is an offset in the file, and strings are to be decoded again by who uses them. (ijson streams too,
but does not say where an element begins.)
An index is kept in `$MOA_CACHE` (default ~/.cache/moa) with the file's size and time of change, and
made anew when either differs.
"""

import csv
import hashlib
import json
import os
import warnings
import zipfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.progress import Progress

from moa.files.atomic import atomic_file

WORTH_CACHING = 1 << 23  # smaller files are scanned faster than a cache is looked up
VERSION = 2  # of what the arrays hold
Arrays = dict[str, np.ndarray]
WINDOW = 1 << 22  # bytes in memory; more only where a single value is larger
CLOSING = {"[": "]", "{": "}"}
DECODER = json.JSONDecoder()


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element of a JSON list or object; strings in `key` and `value` are latin-1 of UTF-8."""

    key: str | None
    start: int
    end: int
    value: Any


class Scanner:
    """A cursor over a JSON file that keeps one window of it in memory."""

    def __init__(self, file: BinaryIO, path: Path, advance: Callable[[int], Any] = lambda _: None):
        self.file, self.path, self.advance = file, path, advance
        self.text, self.offset, self.cursor, self.ended = "", 0, 0, False
        self._more()
        if self.text.startswith("\xef\xbb\xbf"):  # a byte order mark
            self.cursor = 3

    def peek(self) -> str:
        """The next character that is no blank, or nothing at the end of the file."""
        while True:
            while self.cursor < len(self.text) and self.text[self.cursor] in " \t\r\n":
                self.cursor += 1
            if self.cursor < len(self.text) or self.ended:
                return self.text[self.cursor : self.cursor + 1]
            self._more()

    def take(self, choices: str) -> str:
        found = self.peek()
        if not found or found not in choices:
            raise self.error(f"expected one of {choices}, found {found or 'the end of the file'}")
        self.cursor += 1
        return found

    def value(self) -> Element:
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.cursor)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated")
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # an endless number, endless brackets
                raise self.error(str(error)) from None
            else:
                if end + 3 <= len(self.text) or self.ended:  # else a number may go on: 1 of 1e+9
                    start, self.cursor = self.cursor, end
                    offset = self.offset
                    return Element(key=None, start=offset + start, end=offset + end, value=value)
            self._more()

    def elements(self) -> Iterator[Element]:
        """The elements of the list or object at the cursor, one at a time."""
        opening = self.take("[{")
        closing = CLOSING[opening]
        if self.peek() == closing:
            self.take(closing)
            return
        while True:
            key = None
            if opening == "{":
                self.take('"')
                self.cursor -= 1
                key = self.value().value
                self.take(":")
            found = self.value()
            yield Element(key=key, start=found.start, end=found.end, value=found.value)
            if self.take(f",{closing}") == closing:
                return

    def find(self, name: str) -> None:
        """Put the cursor before the value of member `name` of the object there; ValueError with the names it has."""
        passed: list[str] = []
        self.take("{")
        while self.peek() != "}":
            key = str(self.value().value)
            self.take(":")
            if key == name:
                return
            passed.append(key)
            self.skip()
            if self.take(",}") == "}":
                break
        raise ValueError(f"{self.path}: lacks {name!r}; it has {', '.join(passed) or 'nothing'}")

    def skip(self) -> None:
        """Pass over one value; a long list or object is never held whole."""
        if self.peek() in CLOSING:
            for _ in self.elements():
                pass
        else:
            self.value()

    def error(self, message: str, position: int | None = None) -> ValueError:
        place = self.offset + (self.cursor if position is None else position)
        return ValueError(f"{self.path}: not JSON at byte {place}: {message}")

    def _more(self) -> None:
        """Drop what lies before the cursor and read on; more at once where a value is large."""
        rest = self.text[self.cursor :]
        new = self.file.read(max(WINDOW, len(rest)))
        self.advance(len(new))
        self.ended = not new
        self.offset += self.cursor
        self.text, self.cursor = rest + new.decode("latin-1"), 0


def member_of(path: Path, name: str) -> Any:
    """One small member of the object that a file holds, wherever it is."""
    with path.open("rb") as file:
        scanner = Scanner(file, path)
        scanner.find(name)
        return scanner.value().value


def utf8(value: Any) -> Any:
    """The text behind a latin-1 reading of UTF-8 bytes; numbers, and text from escapes, stay."""
    try:
        return value.encode("latin-1").decode() if isinstance(value, str) else value
    except UnicodeError:
        return value


def scan_json(
    path: Path, *, at: str | None = None, key: str | None = None, count: Callable[[Any], int] | None = None
) -> Arrays:
    """`starts`, `ends`, `counts` and, for an object or with `key`, `keys` of the rows of a file.

    `at` names the member of the outermost object that holds the rows; None is the file itself.
    `key` names the field that a row is looked up by; `count` is the number of samples in a row.
    """
    spans, keys = array("q"), []
    with path.open("rb") as file, progress_of(path) as advance:
        scanner = Scanner(file, path, advance)
        if at is not None:
            scanner.find(at)
        for element in scanner.elements():
            spans.extend((element.start, element.end, counted(count, element.value)))
            if key is not None:
                row = element.value
                keys.append(key_bytes(utf8(row.get(key) if isinstance(row, dict) else None)))
            elif element.key is not None:
                keys.append(key_bytes(utf8(element.key)))
    starts, ends, counts = np.array(spans, np.int64).reshape(-1, 3).T
    return {"starts": starts, "ends": ends, "counts": counts} | ({"keys": np.array(keys)} if keys else {})


def counted(count: Callable[[Any], int] | None, row: Any) -> int:
    """How many samples a row holds; a broken one holds one, so that its reading names it."""
    try:
        return 1 if count is None else count(row)
    except (LookupError, TypeError, AttributeError):
        return 1


def key_bytes(value: Any) -> bytes:
    """The form in which keys are compared: 5 and "5" are one key."""
    return str(value).encode(errors="surrogatepass")


def scan_lines(path: Path) -> Arrays:
    """`starts`, `ends` and `numbers` (from 1) of the lines that are not blank."""
    spans, offset = array("q"), 0
    with path.open("rb") as file, progress_of(path) as advance:
        for number, line in enumerate(file, start=1):
            if line.strip():
                spans.extend((offset, offset + len(line), number))
            offset += len(line)
            advance(len(line))
    starts, ends, numbers = np.array(spans, np.int64).reshape(-1, 3).T
    return {"starts": starts, "ends": ends, "numbers": numbers}


def scan_csv(path: Path, delimiter: str) -> Arrays:
    """`starts` and `ends` of the records of a CSV file, the header's first; blank lines are none.

    A quoted cell may hold line breaks. Read as latin-1, a character is a byte.
    """
    spans, start, end = array("q"), 0, 0

    def lines(file: BinaryIO, advance: Callable[[int], None]) -> Iterator[str]:
        nonlocal end
        for line in file:
            end += len(line)
            advance(len(line))
            yield line.decode("latin-1")

    with path.open("rb") as file, progress_of(path) as advance:
        reader = csv.reader(lines(file, advance), delimiter=delimiter)
        try:
            for cells in reader:
                if cells:
                    spans.extend((start, end))
                start = end
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
    return {"starts": starts, "ends": ends}


@contextmanager
def progress_of(path: Path) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of a file that is big enough to wait for."""
    size = path.stat().st_size
    with Progress(transient=True, disable=size < WORTH_CACHING) as bar:
        task = bar.add_task(f"index {path.name}", total=size)
        yield lambda amount: bar.advance(task, amount)


def cached(path: Path, what: str, build: Callable[[], Arrays]) -> Arrays:
    """What `build` finds in the file; `what` names everything but the file that it depends on."""
    stat = path.stat()
    if stat.st_size < WORTH_CACHING:
        return build()
    name = hashlib.sha256(f"{VERSION}\n{path.resolve()}\n{what}".encode()).hexdigest()[:24]
    folder = Path(os.environ.get("MOA_CACHE") or Path.home() / ".cache" / "moa")
    file = folder / f"{path.stem}-{name}.npz"
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    if (known := stored(file, stamp)) is not None:
        return known
    arrays = build()
    try:
        with atomic_file(file) as temporary, temporary.open("wb") as out:
            np.savez(out, allow_pickle=False, **{"stamp": stamp, **arrays})
    except OSError as error:
        warnings.warn(f"the index of {path} is not kept ({error}); set MOA_CACHE", stacklevel=2)
    return arrays


def stored(file: Path, stamp: np.ndarray) -> Arrays | None:
    """The arrays of a cache file that is whole and of this very file, or None."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, zipfile.BadZipFile):  # cut short, or not ours: it is made anew
        return None
    found = arrays.pop("stamp", None)
    return arrays if found is not None and np.array_equal(found, stamp) else None
