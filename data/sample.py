"""The typed sample that every reader yields and every benchmark scores.

Boxes and OCR words stay data, in pixels of the original image, until collation turns them into text or evidence:
the same sample then serves any backbone, whatever its image size and box convention.
"""

from dataclasses import dataclass

from PIL.Image import Image

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original image


@dataclass(frozen=True, kw_only=True)
class OcrWord:
    """One word that an OCR engine read: its box in original pixels, its confidence in [0, 1]."""

    text: str
    box: Box
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer that follow in the same conversation."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one image, or a conversation that begins with it.

    `id` is the data set's own question id, as text; `image_id` groups the questions of one image:
    standard errors are clustered by it. `image` is None for text alone.
    `answers` are all reference answers; a grounding sample has none, and `boxes` instead.
    `instruction` is how to answer; it follows the question and the OCR words.
    `ocr` is None where no engine was run and empty where it found nothing; both are "no evidence".
    `choices` are the names that a classification chooses from, empty for open answers; for CLIP
    `question` is then the template that turns a name into a text ("a photo of a {}").
    `expert` names the expert that this sample trains, or None where it is unknown.
    """

    id: str
    image_id: str
    image: Image | None
    question: str
    answers: tuple[str, ...]
    task: str
    source: str
    expert: str | None = None
    split: str | None = None
    boxes: tuple[Box, ...] = ()
    ocr: tuple[OcrWord, ...] | None = None
    instruction: str = ""
    system: str = ""
    turns: tuple[Turn, ...] = ()
    tags: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image; ValueError for text alone."""
        if self.image is None:
            raise ValueError(f"sample {self.id} has no image")
        return self.image.size
