"""Where each row of a big file lies, so that one row can be read without the others.

    file  --one pass-->  byte offsets, keys, sample counts  -->  cache  -->  seek, read one row

An index is kept in `$MOA_CACHE` (default ~/.cache/moa) with the file's size and time of change, and
made anew when either differs.
"""

import csv
import hashlib
import os
import warnings
import zipfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.progress import Progress

from data.readers.scanner import Scanner
from moa.files.atomic import atomic_file

WORTH_CACHING = 1 << 23  # smaller files are scanned faster than a cache is looked up
VERSION = 2  # of what the arrays hold
Arrays = dict[str, np.ndarray]


def utf8(value: Any) -> Any:
    """The text behind a latin-1 reading of UTF-8 bytes; numbers, and text from escapes, stay."""
    try:
        return value.encode("latin-1").decode() if isinstance(value, str) else value
    except UnicodeError:
        return value


def scan_json(
    path: Path,
    *,
    at: str | None = None,
    key: str | None = None,
    count: Callable[[Any], int] | None = None,
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
    file = cache_folder() / f"{path.stem}-{name}.npz"
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    known = stored(file, stamp)
    if known is not None:
        return known
    arrays = build()
    try:
        store(file, stamp, arrays)
    except OSError as error:
        warnings.warn(f"the index of {path} is not kept ({error}); set MOA_CACHE", stacklevel=2)
    return arrays


def cache_folder() -> Path:
    return Path(os.environ.get("MOA_CACHE") or Path.home() / ".cache" / "moa")


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


def store(file: Path, stamp: np.ndarray, arrays: Arrays) -> None:
    """Write so that other processes see the old file or the whole new one."""
    with atomic_file(file) as temporary, temporary.open("wb") as out:
        np.savez(out, allow_pickle=False, **{"stamp": stamp, **arrays})
