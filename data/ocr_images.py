"""What `scripts.ocr` reads: scenes, the files of a folder, or the images of a source, as lazy sequences.

Each worker renders or decodes the images that it reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from data.checks import BadSampleError
from data.config import SourceConfig
from data.images import is_hidden, open_image
from data.readers.record import RecordDataset
from data.readers.table import open_records
from moa.config import RunConfig

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class LazyImages:
    """The images that `open` makes of some items."""

    items: tuple[Any, ...]
    open: Callable[[Any], Image.Image]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Image.Image:
        return self.open(self.items[index])


def open_file(file: Path) -> Image.Image:
    return open_image(file, str(file))


def open_scene(scene: tuple[str, int, str | None], seed: int) -> Image.Image:
    from data.world.scenes import render_scene  # of the extra `demo`

    split, number, style = scene
    return render_scene(split, number, seed, style)[0]


@dataclass(frozen=True)
class SourceImages:
    """The images of a data set, each once; a worker opens the files for itself."""

    source: SourceConfig
    positions: tuple[tuple[int, int], ...]  # the first sample of each image, and its number there

    @cached_property
    def dataset(self) -> RecordDataset:
        return open_records(self.source, None)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Image.Image:
        row, number = self.positions[index]
        record, where = self.dataset.records.read(row)
        return open_image(record.images[number], where)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "positions": self.positions}


def source_images(config: RunConfig, name: str | None) -> SourceImages:
    """The images of the source of that name, or of the only one that has files."""
    parts = (config.data.sources, config.data.validation, config.eval.sources)
    every = {s.name: s for part in parts for s in part.values() if s.format != "scenes"}
    found = [source for source in every.values() if name in (None, source.name)]
    if len(found) != 1:
        raise ValueError(f"source: name one of {', '.join(sorted(every)) or 'none: all are scenes'}")
    source = found[0]
    return SourceImages(source, first_samples(open_records(source, None)))


def first_samples(dataset: RecordDataset) -> tuple[tuple[int, int], ...]:
    """The first sample of each image, and its number there; rows that cannot be read stay, to be counted as failed."""
    first: dict[object, tuple[int, int]] = {}
    for index in track(range(len(dataset)), "images", transient=True):
        try:
            record, _ = dataset.records.read(index)
        except BadSampleError:
            first[index] = index, 0
            continue
        for number, image in enumerate(record.images):
            key = image if isinstance(image, Path) else (record.image_id, number)
            first.setdefault(key, (index, number))
    return tuple(first.values())


def folder_images(folder: Path) -> LazyImages:
    """The images under a folder, sorted by path; an empty or missing folder is an error."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    files = sorted(p for p in found if not is_hidden(p.relative_to(folder)))
    if not files:
        raise ValueError(f"folder: {folder} holds no image files ({', '.join(sorted(SUFFIXES))})")
    return LazyImages(tuple(files), open_file)


def scene_images(splits: Sequence[str], seed: int) -> LazyImages:
    """`train:3000` is a split and a number of scenes; `train:500:line` fixes their style too."""
    found = []
    for text in splits:
        name, count, style = [*text.split(":"), "", ""][:3]
        if not name or not count.isdecimal() or text.count(":") > 2:
            raise ValueError(f"scenes: {text!r}: write SPLIT:COUNT[:STYLE], as in train:3000")
        found += [(name, number, style or None) for number in range(int(count))]
    return LazyImages(tuple(found), partial(open_scene, seed=seed))
