"""The typed sample that every reader yields and every benchmark scores.

Boxes and OCR words stay data, in pixels of the original picture, until collation turns them into text or evidence:
the same sample then serves any backbone, whatever its picture size and box convention.
"""

from dataclasses import dataclass

from PIL.Image import Image

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original picture


@dataclass(frozen=True, kw_only=True)
class OcrWord:
    """One word that an OCR engine read: its box in original pixels, its confidence in [0, 1]."""

    text: str
    box: Box
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one picture.

    `image_id` groups the questions of one picture: standard errors are clustered by it.
    `answers` are the reference answers; a grounding sample has none, and `boxes` instead.
    `ocr` is None where no engine was run and empty where it found nothing; both are "no evidence".
    `expert` names the expert that this sample trains, or None where nobody knows.
    """

    id: str
    image_id: str
    image: Image
    question: str
    answers: tuple[str, ...]
    task: str
    source: str
    expert: str | None = None
    boxes: tuple[Box, ...] = ()
    ocr: tuple[OcrWord, ...] | None = None
    tags: tuple[str, ...] = ()
