"""Images for CLIP: a folder per class, and tar shards as webdataset writes them.

    folder      <path>/<class>/<image>
    shards      000000.tar with 0001.jpg, 0001.txt (caption), 0001.cls (class) or 0001.json

Shards are read through the standard library's tarfile: webdataset itself only streams, and here
every sample has a number, so that the order is the same on any machine and a run can resume.
"""

import json
import re
import tarfile
from collections import Counter
from functools import partial
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.checks import BadSampleError
from data.config import SourceConfig
from data.images import is_hidden
from data.readers.captions import CAPTION
from data.readers.fields import text
from data.readers.index import Arrays, cached
from data.readers.record import Record, RecordDataset, Records
from data.readers.rows import Row
from data.readers.table import FILE, parses, reads

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
SPARSE = -1  # in place of the size of a file with holes, which a tar stores in pieces
HUGE = 2**62  # more than any shard holds
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@reads("image_folder", needs=FILE, task="classification", prompt="a photo of a {}")
def read_image_folder(source: SourceConfig) -> Records:
    """The answer to each image is its class: the name of the folder it lies in."""
    assert source.path
    root = Path(source.path)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found = (f for f in root.glob("*/*") if f.suffix.lower().lstrip(".") in IMAGES)
    files = sorted(f for f in found if not is_hidden(f.relative_to(root)))
    if not files:
        raise ValueError(f"{root}: holds no <class>/<image> ({', '.join(IMAGES)})")
    classes = tuple(sorted({file.parent.name for file in files}))
    parse = partial(parse_file, root=root, classes=classes)
    return Records(rows=FileRows(files), parse=parse)


class FileRows:
    """A file is a row."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Row:
        return Row(self.files[index], str(self.files[index]))


def parse_file(row: Row, root: Path, classes: tuple[str, ...]) -> Record:
    file, number = row.value, row.value.relative_to(root).as_posix()
    name = (file.parent.name,)
    return Record(id=number, image_id=number, image=file, answers=name, choices=classes)


def open_images(folder: str | Path, question: str, task: str) -> RecordDataset:
    """The same question about every image in a folder and below, by its path there; ValueError where there is none."""
    root = Path(folder)
    found = (f for f in root.rglob("*") if f.suffix.lower().lstrip(".") in IMAGES and f.is_file())
    files = sorted(f for f in found if not is_hidden(f.relative_to(root)))
    if not files:
        raise ValueError(f"{root}: holds no image ({', '.join(IMAGES)})")
    records = Records(rows=FileRows(files), parse=partial(parse_image, root=root, question=question))
    return RecordDataset(records=records, source=root.name or "images", default_task=task)


def parse_image(row: Row, root: Path, question: str) -> Record:
    name = row.value.relative_to(root).as_posix()
    return Record(id=name, image_id=name, image=row.value, question=question)


class TarRows:
    """The samples of several shards: files in a row that share their name up to its first dot."""

    def __init__(self, shards: list[Path]):
        self.shards = shards
        self.indexes = [cached(shard, "tar", partial(scan_tar, shard)) for shard in shards]
        self.last = np.cumsum([len(index["first"]) - 1 for index in self.indexes])

    def __len__(self) -> int:
        return int(self.last[-1])

    def __getitem__(self, index: int) -> Row:
        shard = int(np.searchsorted(self.last, index, side="right"))
        number = index - int(self.last[shard - 1]) if shard else index
        members = self.indexes[shard]
        chosen = range(int(members["first"][number]), int(members["first"][number + 1]))
        key = sample_key(members["names"][chosen[0]].decode()).lstrip("/")
        where = f"{self.shards[shard]}: {key}"
        return Row(read_members(self.shards[shard], members, chosen, where), where, key=key)


def scan_tar(shard: Path) -> Arrays:
    """`names`, `starts`, `sizes` of the files, and the `first` file of each sample."""
    try:
        with tarfile.open(shard, mode="r:") as archive:
            members = [m for m in archive if m.isfile() and not is_hidden(PurePosixPath(m.name))]
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: not a tar file without compression: {error}") from None
    if not members:
        raise ValueError(f"{shard}: holds no files")
    twice = [name for name, count in Counter(m.name for m in members).items() if count > 1]
    if twice:
        raise ValueError(f"{shard}: holds {twice[0]} twice")
    stems = [sample_key(m.name) for m in members]
    first = [i for i in range(len(stems)) if i == 0 or stems[i] != stems[i - 1]]
    return {
        "names": np.array([m.name.encode() for m in members]),
        "starts": np.array([m.offset_data for m in members]),
        "sizes": np.array([SPARSE if m.issparse() else min(m.size, HUGE) for m in members]),
        "first": np.array([*first, len(members)]),
    }


def sample_key(member: str) -> str:
    folder, _, file = member.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def read_members(shard: Path, index: Arrays, chosen: range, where: str) -> dict[str, bytes]:
    """The files of one sample by what follows the first dot of their names."""
    found, end = {}, shard.stat().st_size
    with shard.open("rb") as file:
        for i in chosen:
            file.seek(int(index["starts"][i]))
            name = index["names"][i].decode().rpartition("/")[2]
            size = int(index["sizes"][i])
            if size == SPARSE or file.tell() + size > end:
                detail = f"{name} is sparse or cut short; pack the shard again with plain files"
                raise BadSampleError(where, "unreadable row", detail)
            found[name.partition(".")[2].lower()] = file.read(size)
    return found


def shards_of(pattern: str) -> list[Path]:
    """The files of `shards/{00000..00010}.tar` or `shards/*.tar`; each that is named must exist."""
    found = RANGE.search(pattern)
    if found is None:
        paths = [Path(path) for path in sorted(glob(pattern))]
    else:
        width, numbers = len(found[1]), range(int(found[1]), int(found[2]) + 1)
        paths = [Path(RANGE.sub(f"{n:0{width}d}", pattern, count=1)) for n in numbers]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"{pattern}: no shard {missing[0] if missing else 'matches'}")
    return paths


@parses("webdataset", rows=lambda path: TarRows(shards_of(path)), needs=FILE, task="caption", prompt=CAPTION)
def parse_member(source: SourceConfig, row: Row) -> Record:
    files: dict[str, bytes] = row.value
    images = [files[suffix] for suffix in IMAGES if suffix in files]
    if not images:
        raise BadSampleError(row.where, "missing image", f"among {', '.join(files)}")
    return Record(id=row.key, image_id=row.key, image=images[0], answers=(words_of(files),))


def words_of(files: dict[str, bytes]) -> str:
    """The caption, or the class, of a sample."""
    for suffix in ("txt", "cls"):
        if suffix in files:
            return files[suffix].decode("utf-8-sig").strip()
    if "json" in files:
        about: Any = json.loads(files["json"])
        return text(about, "caption" if "caption" in about else "text")
    raise ValueError(f"has neither txt, cls nor json among {', '.join(files)}")
