"""What data sets are, in a few bytes: to notice between two starts of a run that they changed.

    number of samples · hash of each file of rows · hash of evenly spread samples with their pixels

The cost is the same for any size: files above `WHOLE` bytes are hashed at evenly spread blocks, and
`SAMPLES` samples are decoded. An image that no chosen sample shows may change unnoticed.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from data.checks import BadSampleError
from data.config import DataConfig, SourceConfig
from data.mixture import Source, read_sample
from data.sample import Sample

WHOLE, BLOCKS, BLOCK = 1 << 28, 64, 1 << 20
SAMPLES = 64
FILES = ("path", "annotations", "ocr", "ocr_cache")


def digest_sources(sources: Mapping[str, Source], data: DataConfig) -> dict[str, dict[str, Any]]:
    found = {}
    for name, config in data.sources.items():  # an engine adds words to its cache
        words = None if data.ocr_engine else config.ocr_cache or data.ocr_cache
        found[name] = digest_source(sources[name], replace(config, ocr_cache=words))
    return found


def digest_source(source: Source, config: SourceConfig) -> dict[str, Any]:
    """Number of samples, files' hashes by config key, and samples' hashes by index, as JSON."""
    size = len(source)
    chosen = sorted({int(index) for index in np.linspace(0, size - 1, min(size, SAMPLES))})
    paths = {key: Path(path) for key in FILES if (path := getattr(config, key)) is not None}
    files = {key: digest_file(path) for key, path in paths.items() if path.is_file()}
    content = {str(i): digest_sample(read_sample(source, i, config.name)) for i in chosen}
    return {"samples": size, "files": files, "content": content}


def digest_file(path: Path) -> str:
    size, digest = path.stat().st_size, sha256()
    with path.open("rb") as file:
        if size <= WHOLE:
            return f"{size} bytes, {file_digest(file, 'sha256').hexdigest()[:16]}"
        for start in np.linspace(0, size - BLOCK, BLOCKS, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(BLOCK))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def digest_sample(sample: Sample | BadSampleError) -> str:
    """Of all fields but OCR words, which an engine may read live; of a bad sample its rule."""
    if isinstance(sample, BadSampleError):
        return f"bad sample: {sample.rule}"
    digest = sha256()
    for item in fields(sample):
        value = getattr(sample, item.name)
        if item.name == "image" and value is not None:
            value = pixels_digest(value)
        if item.name == "more_images":
            value = [*map(pixels_digest, value)]
        several = item.name not in ("more_images", "box_image") or sample.more_images
        if several and item.name not in ("ocr", "expert", "source"):
            digest.update(f"{item.name}={value!r};".encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


def pixels_digest(image: Image) -> tuple[str, tuple[int, int], str]:
    return image.mode, image.size, sha256(image.tobytes()).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what of one source is not what it was."""
    if before["samples"] != now["samples"]:
        return [f"has {now['samples']:,} samples, had {before['samples']:,}"]
    was, content = before["files"], now["content"]
    files = [f"{key} is another file" for key, f in now["files"].items() if was.get(key, f) != f]
    known = {i: found.replace("picture", "image") for i, found in before["content"].items()}
    moved = [i for i, found in content.items() if known.get(i, found) != found]
    if moved:
        files.append(f"sample {moved[0]} is another ({len(moved)} of {len(content)} compared)")
    return files
