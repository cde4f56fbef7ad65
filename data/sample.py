"""The typed sample that every reader yields and every benchmark scores.

Boxes and OCR words stay data, in pixels of the original image, until collation turns them into text or evidence:
the same sample then serves any backbone, whatever its image size and box convention.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from PIL.Image import Image

UNKNOWN_TASK = -2  # among ids of tasks: one that is none of the run's; -1: no task, or withheld

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original image
MARK = "<image>"  # the place of an image, as files write it
PLACE = "\ufdd1"  # the same in a sample's questions; no character, so that no text has it by chance


@dataclass(frozen=True, kw_only=True)
class OcrWord:
    """A word of an OCR engine: box in original pixels, confidence in [0, 1], number of its image among the sample's."""

    text: str
    box: Box
    confidence: float
    image: int = field(default=0, repr=False)  # fingerprints of one image hash what is printed


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer that follow in the same conversation."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about an image or several, or a conversation that begins with it.

    `id` is the data set's own question id, as text; `image_id` groups the questions of one image: standard errors are
    clustered by it. `image` is None for text alone, `more_images` are those behind the first. Each has a `PLACE` in the
    questions, in their order; where there is none at all, they stand before the first question. `boxes` lie in image
    `box_image`, from 0; it is None where there are several images and nothing names one.
    `answers` are all reference answers; a grounding sample has none, and `boxes` instead. `instruction` is how to
    answer; it follows the question and the OCR words.
    `ocr` is None where no engine was run and empty where it found nothing; both are "no evidence". `choices` are the
    names that a classification chooses from, empty for open answers; for CLIP `question` is then the template that
    turns a name into a text ("a photo of a {}"). `expert` names the expert that this sample trains, or None where it is
    unknown.
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
    more_images: tuple[Image, ...] = ()
    box_image: int | None = 0

    @property
    def images(self) -> tuple[Image, ...]:
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def main_image(self) -> Image | None:
        """The image that boxes lie in, or else the first."""
        return self.images[self.box_image or 0] if self.image is not None else None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the main image; ValueError for text alone."""
        if self.main_image is None:
            raise ValueError(f"sample {self.id} has no image")
        return self.main_image.size

    @property
    def asked(self) -> str:
        """The first question as a file writes it."""
        return self.question.replace(PLACE, MARK)

    def with_images(self, images: Sequence[Image]) -> Self:
        """The same sample about other images, or none."""
        return replace(self, image=images[0] if images else None, more_images=tuple(images[1:]))


def placed(question: str) -> str:
    """A question with its places of images as samples have them, those at its beginning without blanks."""
    opening = re.match(rf"(?:\s*{MARK}\s*)*", question)
    assert opening is not None
    return PLACE * opening[0].count(MARK) + question[opening.end() :].replace(MARK, PLACE)
