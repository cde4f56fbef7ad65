"""What a frozen vision tower makes of each picture, kept on the disk and read through the page cache.

    picture --key--> known? --yes--> states of the tower: nothing is decoded, resized or computed
                            --no---> pixels -> tower -> add

A folder holds the pictures of one tower with one processor; whoever opens it names it so that another tower or
setting is another folder. A file is a safetensors of many pictures that appears whole or not at all, so writers
need no lock, a killed one loses what it had not written, and readers map the files. A key is the sha256 of a
picture's file, or of its pixels where it was drawn.
"""

import copy
import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.ocr import content_hash
from data.pictures import Picture, open_picture
from data.sample import Sample

SUFFIX, TORN = ".safetensors", ".torn"
SHARD_BYTES, SHARD_SECONDS = 64 * 2**20, 30.0  # a file is written at the first of both
BLANK = Image.new("RGB", (8, 8), "gray")  # shown to chat templates in the place of a known picture


class FeatureStore:
    """The tower's states [tokens, width] by picture; also the hash of its pixels, which OCR words go by.

    `torn` are files that were cut, by a full disk or a copy that ended early: they are put aside, and
    their pictures are unknown again. Memory: some 300 bytes a picture.
    """

    def __init__(self, folder: str | Path, *, dtype: torch.dtype | None = None):
        """`dtype` of what is added; None: as it comes, so that reading gives back the same bits."""
        self.folder, self.dtype = Path(folder), dtype
        self.torn: list[Path] = []
        self._pixels: dict[str, str] = {}  # key -> hash of the pixels
        self._shards: dict[str, Path] = {}  # key -> where its states are
        self._pending: dict[str, Tensor] = {}
        self._seen: set[Path] = set()
        self._changed = -1
        self._open: dict[Path, Any] = {}
        self._written = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self._pixels)

    def __contains__(self, key: str) -> bool:
        return key in self._pixels

    @property
    def num_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self._seen)

    def refresh(self) -> None:
        """Learn of what other processes have added."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._changed:
            return
        self._changed = changed
        for shard in sorted(set(self.folder.glob(f"*{SUFFIX}")) - self._seen):
            try:
                with safe_open(shard, framework="pt") as file:
                    pixels = file.metadata() or {}
            except SafetensorError:  # shorter than its header says, or none at all
                self.torn.append(shard.rename(shard.with_suffix(TORN)))
                continue
            self._seen.add(shard)
            self._pixels |= pixels
            self._shards |= dict.fromkeys(pixels, shard)

    def pixels_of(self, key: str) -> str | None:
        """The hash of a known picture's pixels."""
        return self._pixels.get(key)

    def find(self, keys: Sequence[str]) -> Tensor | None:
        """The states [picture, tokens, width], or None unless all pictures are known."""
        self.refresh()
        if not keys or not all(key in self._pixels for key in keys):
            return None
        return torch.stack([self._states(key) for key in keys])

    def add(self, pictures: Sequence[tuple[str, str]], states: Tensor) -> None:
        """Pictures by key and hash of their pixels, and their states [picture, tokens, width]."""
        for (key, content), row in zip(pictures, states.detach(), strict=True):
            if key not in self:
                # a copy: a view would keep, and write, the whole batch
                self._pending[key] = row.to("cpu", self.dtype or row.dtype, copy=True).contiguous()
                self._pixels[key] = content
        late = time.monotonic() - self._written > SHARD_SECONDS
        if late or sum(row.nbytes for row in self._pending.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added, as one file."""
        self._written = time.monotonic()
        if not self._pending:
            return
        name = uuid.uuid4().hex
        shard, temporary = self.folder / f"{name}{SUFFIX}", self.folder / f".{name}.tmp"
        save_file(self._pending, temporary, {key: self._pixels[key] for key in self._pending})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(shard)
        self._seen.add(shard)
        self._shards |= dict.fromkeys(self._pending, shard)
        self._pending = {}

    def _states(self, key: str) -> Tensor:
        if key in self._pending:
            return self._pending[key]
        shard = self._shards[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard].get_tensor(key)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes, each of which maps the files for itself and adds nothing."""
        return self.__dict__ | {"_open": {}, "_pending": {}}


def open_known(
    picture: Picture, where: str, store: FeatureStore
) -> tuple[Image.Image, str | None, str | None]:
    """The picture, its key, and the hash of its pixels where it is known.

    A known picture is not decoded before somebody looks: PIL reads its size alone.
    """
    if isinstance(picture, Path) and picture.is_file():
        picture = picture.read_bytes()
    if not isinstance(picture, bytes):
        return open_picture(picture, where), None, None
    key = hashlib.sha256(picture).hexdigest()
    content = store.pixels_of(key)
    if content is None:
        return open_picture(picture, where), key, None
    return Image.open(BytesIO(picture)), key, content


def picture_keys(samples: Sequence[Sample]) -> list[str]:
    """The keys of all pictures, in order."""
    return [s.picture_key or content_hash(s.image) for s in samples if s.image is not None]


class SizeAlone:
    """An image processor for known pictures: says how large they will be, and does nothing."""

    def __init__(self, processor: Any, shape: Sequence[int]):
        self._processor = processor
        self._pixels = np.broadcast_to(np.float32(0), tuple(shape))

    def __call__(self, images: Any, **_: Any) -> dict[str, Any]:
        count = sum(len(group) if isinstance(group, list) else 1 for group in images)
        return {"pixel_values": [self._pixels] * count}

    def fetch_images(self, images: Any) -> Any:
        return images

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_processor":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._processor, name)


def without_pictures(processor: Any) -> Any:
    """The processor, working on texts alone; ValueError unless all pictures become one fixed shape."""
    shapes = set()
    for size in ((64, 64), (150, 50)):
        made = dict(processor.image_processor([Image.new("RGB", size, "gray")]))
        shapes.add(np.asarray(made.pop("pixel_values")[0]).shape)
        if made or len(shapes) > 1 or len(min(shapes)) != 3:
            name = type(processor.image_processor).__name__
            raise ValueError(
                f"data.feature_cache: {name} may cut a picture into as many parts as its size "
                "wants; choices: a base whose pictures all become one square, feature_cache=null"
            )
    light = copy.copy(processor)
    light.image_processor = SizeAlone(processor.image_processor, shapes.pop())
    return light
