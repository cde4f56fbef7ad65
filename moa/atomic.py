"""Files and folders that appear on the disk whole or not at all, also after a loss of power.

What they hold is on the disk before their name is, and the name before the function returns.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    _sync(file.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder that must not be seen half deleted: its name goes first."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, or vanishes."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: a file of this name is in the way of the folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, f"{target}: cannot be written: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for file in (*temporary.rglob("*"), temporary):
            _sync(file)
        _replace(temporary, target)
        _sync(target.parent)
    except Exception as error:
        if (found := system_error(error)) is None:
            raise
        number, reason = found
        raise OSError(number, f"{target}: not written, nothing was changed: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def system_error(error: Exception) -> tuple[int, str] | None:
    """Number and text of what the system refused; None for another error.

    Safetensors and tokenizers write it into the text of an error of their own, or of a bare Exception.
    """
    if isinstance(error, OSError):
        return error.errno or errno.EIO, error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (int(number[1]), str(error)) if number else None


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    target.rename(old)  # a folder that is not empty cannot be renamed over
    try:
        temporary.rename(target)
    except BaseException:  # a signal's handler may raise anything here
        old.rename(target)
        raise
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
