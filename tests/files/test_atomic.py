"""Writing: whole or not at all, with the umask's modes, through links, and without litter."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.ocr import write_table
from moa.analysis.plots import page
from moa.files import atomic
from moa.files.atomic import atomic_file, atomic_folder, write_file, write_json
from tests import ROOT


def write_weights(path: Path) -> None:
    """A folder as exports make it: nested, and weights of a library that keeps them private."""
    with atomic_folder(path) as folder:
        (folder / "expert").mkdir(mode=0o700)
        save_file({"weight": torch.zeros(2)}, folder / "expert" / "model.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / "config.json").chmod(0o444)  # copied from a base that is read-only


def draw(path: Path) -> None:
    with page(path, 3.0, 2.0, "Title"):
        pass


def write_single(path: Path) -> None:
    with atomic_file(path) as temporary:
        save_file({"weight": torch.zeros(2)}, temporary)


# Every way in which the project writes a file; the name's end is part of the contract of some.
WRITERS: dict[str, Callable[[Path], None]] = {
    "weights": write_weights,
    "single.safetensors": write_single,
    "text.md": lambda path: write_file(path, "text"),
    "record.json": lambda path: write_json(path, {"a": 1}),
    "chart.png": draw,
    "ocr.parquet": lambda path: write_table(path, {}, {}),
}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file may grow beyond `size` bytes; the system's word for it is another than for a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        signal.signal(signal.SIGXFSZ, before)


def modes(path: Path) -> set[tuple[bool, int]]:
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    return {(p.is_dir(), stat.S_IMODE(p.stat().st_mode)) for p in found}


def bytes_of(path: Path) -> dict[str, bytes]:
    found = path.rglob("*") if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.read_bytes() for p in found if p.is_file()}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("name", WRITERS)
def test_modes_follow_the_umask(name, mask, tmp_path):
    with umask(mask):
        WRITERS[name](tmp_path / name)
    wanted = {(False, 0o666 & ~mask)}
    wanted |= {(True, 0o777 & ~mask)} if (tmp_path / name).is_dir() else set()
    assert modes(tmp_path / name) == wanted


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_the_error_names_it(name, tmp_path):
    target = tmp_path / name
    WRITERS[name](target)
    before = bytes_of(target)
    with full_disk(), pytest.raises(OSError, match="not written, nothing was changed") as caught:
        WRITERS[name](target)
    assert str(target) in str(caught.value) and caught.value.errno == errno.EFBIG
    assert bytes_of(target) == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_stays_and_what_it_names_is_replaced(name, tmp_path):
    target, link = tmp_path / "disk" / name, tmp_path / f"link-{name}"
    link.symlink_to(target)
    for _ in range(2):  # first the link leads nowhere yet
        WRITERS[name](link)
    assert link.is_symlink() and target.exists()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.parent in (tmp_path, target.parent)) == (
        sorted([link.name, "disk", name])
    )


def test_a_group_folder_keeps_its_group_for_what_is_written_into_it(tmp_path):
    tmp_path.chmod(0o2775)
    with umask(0o002):
        write_weights(tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2775


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_a_result_that_json_cannot_hold_is_refused_and_the_old_file_stays(value, tmp_path):
    write_json(tmp_path / "scores.json", 1)
    with pytest.raises(ValueError, match=r"scores\.json: not written: .*not JSON compliant"):
        write_json(tmp_path / "scores.json", value)
    assert (tmp_path / "scores.json").read_text() == "1\n"


KILLED = """
import os, signal, sys
from moa.files import atomic
replace = atomic._replace
def struck(temporary, target):
    if sys.argv[2] == "after":
        replace(temporary, target)
    os.kill(os.getpid(), signal.SIGKILL)
atomic._replace = struck
with atomic.atomic_folder(sys.argv[1]) as folder:
    (folder / "new").touch()
"""


@pytest.mark.parametrize(("moment", "found"), [("before", "old"), ("after", "new")])
def test_a_kill_leaves_the_old_or_the_new_and_the_next_writer_removes_the_rest(moment, found, tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "old").touch()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), moment]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "out").iterdir()] == [found]
    with atomic_folder(tmp_path / "out") as live, atomic_folder(tmp_path / "out"):
        assert live.is_dir()  # a writer that is at work is no remnant
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_of_names_a_kill_between_the_renames_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda *names: False)
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / name).touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    (tmp_path / "out").rename(tmp_path / ".out.old")  # as a kill at that moment leaves it
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "out"):
        raise ValueError("stop")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_a_name_that_is_taken_by_the_other_kind_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="a folder of this name is in the way of the file"):
        write_file(tmp_path / "folder", "text")
    write_file(tmp_path / "file", "text")
    with pytest.raises(ValueError, match="a file of this name is in the way of the folder"):
        write_weights(tmp_path / "file")
