"""OCR evidence: a real engine run over the pixels, cached on disk by content.

The key of a cache row is the image itself (sha256 over size and RGB bytes), so that a cache never
answers for another image, and images that several tasks share are read once. Cached and live
readings are equal: the engine already rounds to what the Parquet file stores.

    images -> build_cache (several processes, resumable) -> one Parquet -> OcrCache.get(image)
             -> build_cache(shard=(i, n)), on n machines -> merge_shards ->
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image
from rich.progress import track

from data.images import to_rgb
from data.ocr_engines import Engine, RapidOcr, Words
from data.sample import OcrWord
from data.workers import map_in_workers
from moa.files.atomic import atomic_file

# A cache or a live engine, from an image; None = no OCR was run.
OcrSource = Callable[[Image], Words | None]
Table = dict[str, Words]

METADATA_KEY = b"moa.ocr"
SCHEMA = pa.schema({
    "hash": pa.string(), "words": pa.list_(pa.string()),
    "boxes": pa.list_(pa.list_(pa.int32())), "confidences": pa.list_(pa.float64()),
})  # fmt: skip


def content_hash(image: Image) -> str:
    """sha256 over the size and the RGB bytes: equal images, equal hash, whatever the file."""
    rgb = to_rgb(image)
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def words_on(images: Sequence[Image], ocr: OcrSource) -> Words | None:
    """The words of several images with their image's number; None where none was read."""
    found = [ocr(image) for image in images]
    if all(words is None for words in found):
        return None
    return tuple(replace(word, image=n) if n else word for n, words in enumerate(found) for word in words or ())


class OcrCache:
    """Words by content hash, in memory. An image that the file lacks is read by `engine` and kept, or has None."""

    def __init__(self, path: str | Path | None = None, *, engine: Engine | None = None):
        self.path = Path(path) if path is not None else None
        self.engine = engine
        self.table: Table = {}
        self.settings: dict[str, Any] = engine.settings if engine else {}
        if self.path is not None and (self.path.exists() or engine is None):
            self.table, found = read_table(self.path)
            if engine is not None:
                check_settings(self.path, found, engine.settings)
            self.settings = found

    def __len__(self) -> int:
        return len(self.table)

    def get(self, image: Image) -> Words | None:
        key = content_hash(image)
        if key not in self.table and self.engine is not None:
            self.table[key] = self.engine.read(image)
        return self.table.get(key)

    __call__ = get

    def save(self) -> None:
        """Write everything known, the live readings too, back to `path`."""
        if self.path is None:
            raise ValueError("OcrCache.save: this cache was made without a path")
        write_table(self.path, self.table, self.settings)


def read_table(path: Path) -> tuple[Table, dict[str, Any]]:
    """The words by hash, and the engine's settings; a missing or foreign file is one error."""
    if not path.is_file():
        raise ValueError(f"{path}: no such OCR cache; make it with scripts.ocr")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if metadata is None or missing:
        raise ValueError(f"{path}: not an OCR cache; lacks {missing or 'the engine settings'}")
    found: Table = {}
    for number, row in enumerate(table.to_pylist(), start=1):
        try:
            found[row["hash"]] = _words(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {number}: not the words of an image: {error}") from None
    return found, json.loads(metadata)


def _words(row: dict[str, Any]) -> Words:
    if None in row["words"]:
        raise ValueError("a word is missing")
    cells = zip(row["words"], row["boxes"], row["confidences"], strict=True)
    return tuple(
        OcrWord(text=text, box=(float(x0), float(y0), float(x1), float(y1)),
                confidence=float(confidence))
        for text, (x0, y0, x1, y1), confidence in cells
    )  # fmt: skip


def write_table(path: Path, table: Table, settings: dict[str, Any]) -> None:
    """Write atomically; rows are sorted by hash, so that the same images give the same file."""
    columns = {
        "hash": sorted(table),
        "words": [[w.text for w in table[key]] for key in sorted(table)],
        "boxes": [[[int(v) for v in w.box] for w in table[key]] for key in sorted(table)],
        "confidences": [[w.confidence for w in table[key]] for key in sorted(table)],
    }
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(settings, sort_keys=True)})
    written = pa.Table.from_pydict(columns, schema=schema)
    with atomic_file(path) as temporary:
        pq.write_table(written, temporary, compression="zstd", compression_level=19)


def check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix the readings of two engines, or of two settings, in one file."""
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            both = f"{found.get(key)!r} in this cache and {wanted.get(key)!r} here"
            raise ValueError(f"{path}: {key} is {both}; delete the file, or take its own setting")


@dataclass(kw_only=True)
class BuildReport:
    """What became of each image: `read` by the engine, `known` before, or failed for a reason."""

    read: int = 0
    known: int = 0
    failures: dict[str, list[int]] = field(default_factory=dict)  # reason -> positions

    @property
    def failed(self) -> int:
        return sum(map(len, self.failures.values()))


def build_cache(
    images: Any,
    path: str | Path,
    *,
    num_workers: int = 2,
    part_size: int = 200,
    engine: Engine | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> BuildReport:
    """Read every image into the cache at `path`, `part_size` images at a time.

    `images`, a sequence of images, is indexed inside the worker processes, so that a lazy one renders or
    decodes there; it must pickle. A killed build continues from its last part, and images in the file
    are kept. An image that cannot be opened or read is counted by reason.

    `shard` (i, n) reads only the images i, i + n, ..., into `shard_file(path, i, n)`; those that are
    in `path` already are known. `merge_shards` then writes what one build would have written.
    """
    path, engine, report = Path(path), engine or RapidOcr(), BuildReport()
    before = _resume([path], engine.settings) if shard[1] > 1 else {}
    path = shard_file(path, *shard)
    table, fresh = _resume([path, *_parts(path)], engine.settings), Table()
    known = frozenset(before | table)
    positions = range(shard[0], len(images), shard[1])
    # spawn: a forked onnxruntime session may hang on locks that its parent held
    shared = {"images": images, "engine": engine, "known": known}
    results = map_in_workers(_read_one, positions, shared, num_workers, "spawn", chunksize=4)
    bar = track(results, "OCR", total=len(positions), disable=not progress)
    for position, (key, words, reason) in zip(positions, bar, strict=True):
        if reason is not None:
            report.failures.setdefault(reason, []).append(position)
        elif words is None or key in table:
            report.known += 1
        else:
            report.read += 1
            table[key] = fresh[key] = words
        if len(fresh) >= part_size:
            part = path.with_name(f"{path.name}.part-{len(table):08d}")
            write_table(part, fresh, engine.settings)
            fresh = {}
    write_table(path, table, engine.settings)
    for part in _parts(path):
        part.unlink()
    return report


def shard_file(path: Path, index: int, count: int) -> Path:
    """ocr.parquet -> ocr.2-of-8.parquet; the path itself where there is only one."""
    return path if count == 1 else path.with_name(f"{path.stem}.{index}-of-{count}{path.suffix}")


def merge_shards(path: str | Path, count: int) -> None:
    """Write the `count` shards and what `path` holds into it, as one build would; ValueError where they do not fit."""
    path, table, settings = Path(path), Table(), dict[str, Any]()
    files = [shard_file(path, index, count) for index in range(count)]
    for index, file in enumerate(files):
        if not file.exists():
            raise ValueError(f"{file}: missing; --shard {index}/{count} makes it")
    for file in [*files, *([path] if path.exists() else [])]:
        rows, found = read_table(file)
        settings = settings or found
        check_settings(file, found, settings)
        for key, words in rows.items():
            if table.setdefault(key, words) != words:
                raise ValueError(f"{file}: has other words than a shard before it for image {key}")
    write_table(path, table, settings)


def _parts(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.glob(f"{path.name}.part-*") if p.suffix != ".tmp")


def _resume(files: Iterable[Path], settings: dict[str, Any]) -> Table:
    table: Table = {}
    for file in filter(Path.exists, files):
        rows, found = read_table(file)
        check_settings(file, found, settings)
        table.update(rows)
    return table


def _read_one(
    position: int, images: Any, engine: Engine, known: frozenset[str]
) -> tuple[str, Words | None, str | None]:
    """The hash of an image, its words (None if known), and why it could not be read."""
    try:
        image = images[position]
        key = content_hash(image)
        return key, None if key in known else engine.read(image), None
    except Exception as error:  # one bad image must not stop the rest: it is counted and named
        return "", None, f"{type(error).__name__}: {error}"
