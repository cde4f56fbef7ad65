"""What a measurement belongs to: digests of its data and its settings, beside that of the weights.

A result file is taken as a model's only where all three are those of the model, the data and the settings at hand.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from data.checks import BadSampleError
from data.digest import pixels_digest
from data.sample import Sample

# Settings that change no answer: what fits into memory, and an example for the reader.
NOT_MEASURED = ("batch_size", "example")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def sample_digest(item: Sample | BadSampleError) -> str:
    """Of a sample's texts, boxes and pixels; of a bad one, of its error."""
    if isinstance(item, BadSampleError):
        return digest(str(item))
    rest = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in ("image", "more_images", "box_image")}
    pixels = "" if item.image is None else hashlib.sha256(item.image.tobytes()).hexdigest()
    size = None if item.image is None else (item.image.mode, item.image.size)
    more: list[Any] = [pixels_digest(image) for image in item.more_images]
    if more:  # the digest of one image is what it always was
        more += [item.box_image, *(word.image for word in item.ocr or ())]
    return digest(f"{rest} {size} {pixels}{more or ''}")


def data_digest(samples: Iterable[str]) -> str:
    """Of samples in their order, from the digest of each."""
    return digest("\n".join(samples))


def settings_digest(settings: Mapping[str, Any]) -> str:
    return digest(json.dumps(_measured(settings), sort_keys=True, default=str))


def _measured(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _measured(v) for key, v in value.items() if key not in NOT_MEASURED}


def read_result(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Record and rows of an evaluation; None where there is none, or where the two are of different ones."""
    try:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
        if record["fingerprints"]["rows"] != digest(text):
            return None
        return record, [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError, KeyError, TypeError):
        return None
