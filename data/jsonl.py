"""The simplest data set of one's own: a JSON-lines file, one question about one picture a line.

    {"image": "pictures/1.jpg", "question": "what is this?", "answers": ["a cat"], "task": "vqa"}

`image` is relative to the file. Optional: `id`, `image_id`, `boxes` ([[x0, y0, x1, y1], ...] in
pixels), `ocr` ([{"text", "box", "confidence"}, ...]), `tags`. A row is read when it is asked for;
a bad one raises BadSampleError with file and row (the first row is 1).
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from data.checks import BadSampleError, check_sample
from data.sample import OcrWord, Sample

REQUIRED = ("image", "question", "task")
OPTIONAL = ("id", "image_id", "answers", "boxes", "ocr", "tags")


class JsonlDataset:
    """Map-style: `len`, `[i] -> Sample`. `ocr` reads the words of rows that bring none."""

    def __init__(
        self,
        path: str | Path,
        *,
        source: str,
        expert: str | None = None,
        num_samples: int | None = None,
        ocr: Any = None,
    ):
        self.path, self.source, self.expert, self.ocr = Path(path), source, expert, ocr
        if not self.path.is_file():
            raise ValueError(f"{path}: no such data file (source {source!r})")
        lines = enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1)
        self.rows = [(number, line) for number, line in lines if line.strip()][:num_samples]
        if not self.rows:
            raise ValueError(f"{path}: holds no rows (source {source!r})")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        number, line = self.rows[index]
        where = f"{self.path}:{number}"
        row = parse_row(line, where)
        try:
            sample = self._sample(row, number, open_picture(self.path.parent / row["image"], where))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, BadSampleError):
                raise
            raise BadSampleError(where, "unreadable row", f"{error!r}") from None
        check_sample(sample, needs_answer=False, where=where)
        return sample

    def _sample(self, row: dict[str, Any], number: int, image: Image.Image) -> Sample:
        ocr = row.get("ocr")
        if ocr is None and self.ocr is not None:
            words = self.ocr(image)
        else:
            words = None if ocr is None else tuple(word_of(word) for word in ocr)
        return Sample(
            id=str(row.get("id", f"{self.path.name}:{number}")),
            image_id=str(row.get("image_id", row["image"])),
            image=image,
            question=row["question"],
            answers=tuple(row.get("answers", ())),
            task=row["task"],
            source=self.source,
            expert=self.expert,
            boxes=tuple(box_of(box) for box in row.get("boxes", ())),
            ocr=words,
            tags=tuple(row.get("tags", ())),
        )


def parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadSampleError(where, "unreadable row", f"not JSON: {error}") from None
    missing = [key for key in REQUIRED if key not in row] if isinstance(row, dict) else REQUIRED
    if missing:
        raise BadSampleError(where, "unreadable row", f"lacks {', '.join(missing)}")
    unknown = [key for key in row if key not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        known = ", ".join((*REQUIRED, *OPTIONAL))
        raise BadSampleError(where, "unreadable row", f"unknown key {unknown}; choices: {known}")
    return row


def open_picture(path: Path, where: str) -> Image.Image:
    """The whole picture as RGB; PIL reads lazily, and a truncated file shows only here."""
    if not path.is_file():
        raise BadSampleError(where, "missing image", str(path))
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for broken files
        raise BadSampleError(where, "broken image", f"{path}: {error}") from None


def word_of(word: dict[str, Any]) -> OcrWord:
    confidence = float(word.get("confidence", 1.0))
    return OcrWord(text=word["text"], box=box_of(word["box"]), confidence=confidence)


def box_of(values: Any) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = map(float, values)
    return x0, y0, x1, y1
