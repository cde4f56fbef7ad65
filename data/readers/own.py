"""The simplest data set of one's own: a JSON-lines file, one question about one image a line.

    {"image": "images/1.jpg", "question": "what is this?", "answers": ["a cat"], "task": "vqa"}

`image` lies below the source's `images`; where that is not set it is any path, from the file.
Optional: `id`, `image_id`, `answers`, `boxes` ([[x0, y0, x1, y1], ...] in pixels), `ocr` ([{"text",
"box", "confidence"}, ...]), `frame` ([width, height] that the row's boxes are given in instead of
pixels: [1, 1] for shares), `tags`, `choices` (for classification). A key that is none of these is an
error: it is a slip.
"""

from functools import partial
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.images import find_image
from data.readers.fields import box_of, boxes_of, field, frame_of, name, text, texts
from data.readers.record import Record, Records
from data.readers.rows import JsonLines, Row
from data.readers.table import FILE, reads
from data.sample import OcrWord

REQUIRED = ("image", "question", "task")
OPTIONAL = ("id", "image_id", "answers", "boxes", "ocr", "frame", "tags", "choices")


@reads("jsonl", needs=FILE, may=("images",))
def read_jsonl(source: SourceConfig) -> Records:
    assert source.path
    rows = JsonLines(source.path)
    return Records(rows=rows, parse=partial(parse_own, source.images, rows.path.parent))


def parse_own(images: str | None, folder: Path, row: Row) -> Record:
    value = row.value
    if not isinstance(value, dict):
        raise ValueError(f"a row is one object a line, got {type(value).__name__}: {value!r:.60}")
    missing = [key for key in REQUIRED if key not in value]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; it has {', '.join(value) or 'nothing'}")
    unknown = [key for key in value if key not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        raise ValueError(f"unknown key {unknown}; choices: {', '.join((*REQUIRED, *OPTIONAL))}")
    image, file = text(value, "image"), Path(row.where).name
    boxes = boxes_of(value.get("boxes"))
    words = tuple(map(word_of, field(value, "ocr", list))) if value.get("ocr") is not None else None
    own: dict[str, Any] = {key: text(value, key) for key in ("question", "task")}
    own |= {key: texts(value, key, missing=()) for key in ("answers", "tags", "choices")}
    own |= {"id": name(value, "id") if "id" in value else file}
    own |= {"image_id": name(value, "image_id") if "image_id" in value else image}
    own |= {"frame": frame_of(value.get("frame"), boxes, words or ())}
    stored = find_image(images, image) if images else folder / image
    return Record(image=stored, boxes=boxes, ocr=words, **own)


def word_of(word: Any) -> OcrWord:
    said, box = text(word, "text"), box_of(field(word, "box", list))
    sure = float(field(word, "confidence", int, float)) if "confidence" in word else 1.0
    return OcrWord(text=said, box=box, confidence=sure)
