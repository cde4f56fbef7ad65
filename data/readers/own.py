"""The simplest data set of one's own: a JSON-lines file, one question about one image (or several) a line.

    {"image": "images/1.jpg", "question": "what is this?", "answers": ["a cat"], "task": "vqa"}

`image` lies below the source's `images`; where that is not set it is any path, from the file. It may be a list, of
which each has an `<image>` in the question, or all stand before it; then boxes need `box_image`, and words `image`: the
number of their image, from 0.
Optional: `id`, `image_id`, `answers`, `boxes` ([[x0, y0, x1, y1], ...] in pixels), `ocr` ([{"text", "box",
"confidence"}, ...]), `frame` ([width, height] that the row's boxes are given in instead of pixels: [1, 1] for shares),
`tags`, `choices` (for classification). A key that is none of these is an error: it is a slip.
"""

from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.images import find_image
from data.readers.fields import box_of, boxes_of, field, frame_of, name, number_of, text, texts
from data.readers.record import Record
from data.readers.rows import JsonLines, Row
from data.readers.table import FILE, parses
from data.readers.tables import fields_of
from data.sample import OcrWord, placed

REQUIRED = ("image", "question", "task")
OPTIONAL = ("id", "image_id", "answers", "boxes", "box_image", "ocr", "frame", "tags", "choices")


@parses("jsonl", rows=JsonLines, needs=FILE, may=("images",))
def parse_own(source: SourceConfig, row: Row) -> Record:
    value, images, folder = row.value, source.images, Path(source.path or "").parent
    if not isinstance(value, dict):
        raise ValueError(f"a row is one object a line, got {type(value).__name__}: {value!r:.60}")
    missing = [key for key in REQUIRED if key not in value]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}; it has {', '.join(value) or 'nothing'}")
    unknown = [key for key in value if key not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        raise ValueError(f"unknown key {unknown}; choices: {', '.join((*REQUIRED, *OPTIONAL))}")
    listed = isinstance(value["image"], list)
    names = texts(value, "image") if listed else (text(value, "image"),)
    if not names:
        raise ValueError("'image' is an empty list; a row asks about an image")
    boxes = boxes_of(value.get("boxes"))
    read = field(value, "ocr", list) if value.get("ocr") is not None else None
    words = None if read is None else tuple(word_of(word, len(names) > 1) for word in read)
    own: dict[str, Any] = {key: text(value, key) for key in ("question", "task")}
    own |= {key: texts(value, key, missing=()) for key in ("answers", "tags", "choices")}
    if listed:
        own["question"] = placed(own["question"])
    own |= {"id": name(value, "id") if "id" in value else Path(row.where).name}
    own |= {"image_id": name(value, "image_id") if "image_id" in value else " ".join(names)}
    own |= {"frame": frame_of(value.get("frame"), boxes, words or ())}
    own |= {"box_image": number_of(value.get("box_image"), "box_image")}
    stored = [find_image(images, image) if images else folder / image for image in names]
    return Record(boxes=boxes, ocr=words, **fields_of(stored), **own)


def word_of(word: Any, several: bool) -> OcrWord:
    image = number_of(word.get("image"), "image") if isinstance(word, dict) else None
    if several and image is None:
        raise ValueError(f"an OCR word needs `image`, the number of its image from 0, got {word!r:.60}")
    said, box = text(word, "text"), box_of(field(word, "box", list))
    sure = float(field(word, "confidence", int, float)) if "confidence" in word else 1.0
    return OcrWord(text=said, box=box, confidence=sure, image=image or 0)
