"""Files and folders that appear on the disk whole or not at all, also after a kill or a loss of power.

What they hold is on the disk before their name is, and the name before the function returns. Their modes follow
the umask, whatever a library chose for them: a colleague reads what a shared folder lets them read.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FOLDER_OF_PROCESS, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def write_json(file: str | Path, value: Any) -> None:
    """Write a JSON file whole or not at all; ValueError for NaN and infinity, which JSON does not have."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{file}: not written: {error}") from error
    write_file(file, text + "\n")


def write_file(file: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text as UTF-8."""
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    with atomic_file(file) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, or vanishes."""
    with _beside(path, "file", lambda hidden: hidden.touch(exist_ok=False)) as (target, temporary):
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # a library may have put another file in its place
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, or vanishes."""
    with _beside(path, "folder", lambda hidden: hidden.mkdir()) as (target, temporary):
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            if not inner.is_symlink():
                inner.chmod(mode if inner.is_dir() else mode & 0o666)
                _sync(inner)
        _replace(temporary, target)
        _sync(target.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is inside this block for the folder, which is made; a process that ends leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Delete a folder that must not be seen half deleted: its name goes first."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def system_error(error: Exception) -> tuple[int, str] | None:
    """Number and text of what the system refused, also inside a library's own error; None for another error."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO, error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (int(number[1]), str(error)) if number else None


@contextmanager
def _beside(path: str | Path, kind: str, make: Callable[[Path], None]) -> Iterator[tuple[Path, Path]]:
    """Where `path` leads to, and a new hidden file or folder beside it, gone in the end; OSError names `path`."""
    target = Path(os.path.realpath(path))  # a link stays, and what it names is replaced
    if target.exists() and target.is_dir() != (kind == "folder"):
        other = "file" if kind == "folder" else "folder"
        raise ValueError(f"{path}: a {other} of this name is in the way of the {kind}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_remnants(target)
        temporary, lock = _reserve(target, make)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield target, temporary
    except Exception as error:
        if (found := system_error(error)) is None:
            raise
        number, reason = found
        raise OSError(number, f"{path}: not written, nothing was changed: {reason}") from error
    finally:
        _delete(temporary)
        os.close(lock)


def _reserve(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new hidden name beside `target`, and its open lock, which ends with this process."""
    while True:
        hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        make(hidden)
        handle = os.open(hidden, os.O_RDONLY)
        held = _lock(handle)
        # Between the lines another process may have taken it for a remnant.
        if held is not False and hidden.exists():
            return hidden, handle
        os.close(handle)


def _remove_remnants(target: Path) -> None:
    """Delete what killed processes left beside `target`: no process holds its lock any more."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for hidden in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
        with suppress(FileNotFoundError):  # its process has ended well since
            handle = os.open(hidden, os.O_RDONLY)
            if _lock(handle):
                _delete(hidden)
            os.close(handle)
    old = _old(target)
    if old.is_dir() and not target.exists():  # killed between the two renames
        old.rename(target)
    _delete(old)


def _lock(handle: int) -> bool | None:
    """Whether the file or folder is now locked by this process; None where the disk has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _replace(temporary: Path, target: Path) -> None:
    """Put a folder in the place of another, which then has the temporary name or is gone."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        old = _old(target)
        target.rename(old)  # a folder that is not empty cannot be renamed over
        try:
            temporary.rename(target)
        except BaseException:  # a signal's handler may raise anything here
            old.rename(target)
            raise
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, so that a kill leaves the old or the new; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    done = renameat2(FOLDER_OF_PROCESS, names[0], FOLDER_OF_PROCESS, names[1], EXCHANGE)
    return bool(done == 0)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
