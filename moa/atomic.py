"""Folders that appear on the disk whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, or vanishes.

    Files are on the disk before the rename, so a name never stands for a folder half written.
    """
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
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own error
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"{target}: not written, nothing was changed: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    target.rename(old)  # a folder that is not empty cannot be renamed over
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
