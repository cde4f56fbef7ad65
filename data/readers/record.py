"""What a file holds of one sample, and the data set that turns records into samples.

    rows (of a file)  --parse-->  Record (the image is still a file)  --open-->  Sample

A reader is a function from a source's config to `Records`. Whatever is wrong with a row ends in one
BadSampleError that names the file and the row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data.checks import BadSampleError, check_sample, check_words
from data.config import SourceConfig
from data.images import StoredImage, find_image, open_image
from data.ocr import OcrSource, words_on
from data.readers.fields import name, text
from data.readers.rows import Row, Rows
from data.sample import Box, OcrWord, Sample, Turn

SAME = ("id", "image_id", "answers", "system", "turns", "tags", "choices")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A sample but for its images; the fields are Sample's.

    `frame` is the width and height that boxes and OCR boxes are given in, None for the image's
    own pixels: (1, 1) for shares of the image, or the size that the annotators saw. A box may stick
    out of the image by `slack` pixels, where the file is known to round; it is cut there.
    """

    id: str
    image_id: str
    image: StoredImage | None
    question: str = ""
    answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    ocr: tuple[OcrWord, ...] | None = None
    frame: tuple[float, float] | None = None
    slack: float = 0.0
    task: str | None = None
    split: str | None = None
    system: str = ""
    turns: tuple[Turn, ...] = ()
    tags: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    more_images: tuple[StoredImage, ...] = ()
    box_image: int | None = None  # needed where there are several images

    @property
    def images(self) -> tuple[StoredImage, ...]:
        return () if self.image is None else (self.image, *self.more_images)


def asked(source: SourceConfig, row: Row, *files: str, **more: Any) -> Record:
    """The record of a question, with the keys that most data sets have, about the first of `files` that is there."""
    keys = {"id": ("question_id", name), "image_id": ("image_id", name), "question": ("question", text)}
    own: dict[str, Any] = {k: f(row.value, at) for k, (at, f) in keys.items() if k not in more}
    return Record(image=find_image(source.images, *files), **own, **more)


@dataclass(frozen=True, kw_only=True)
class Records:
    """The records of a source: each row is parsed when it is asked for."""

    rows: Rows
    parse: Callable[[Row], Record]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Record, str]:
        row = self.rows[index]
        try:
            record = self.parse(row)
            check_record(record)
        except BadSampleError as error:  # of another file, which the row leads to
            if error.where == row.where:
                raise
            raise BadSampleError(row.where, error.rule, f"{error.where}: {error.detail}") from None
        except Exception as error:  # what a row holds can fail in any way
            raise BadSampleError(row.where, "unreadable row", reason(error)) from None
        return record, row.where


def reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks {error}"
    return str(error) if isinstance(error, ValueError) else f"{error!r:.200}"


def check_record(record: Record) -> None:
    """ValueError for texts that are not Unicode, and a frame that no box can lie in."""
    for key, value in vars(record).items():
        for found in texts_in(value):
            try:
                found.encode()
            except UnicodeEncodeError:
                detail = f"half a character (a lone surrogate): {found!r:.60}"
                raise ValueError(f"{key!r} holds {detail}") from None
    if record.frame is not None and not all(0 < float(side) < math.inf for side in record.frame):
        raise ValueError(f"boxes lie in a frame of {record.frame}; both sides must be above 0")


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, OcrWord):
        yield value.text
    elif isinstance(value, Turn):
        yield from (value.question, value.answer)
    elif isinstance(value, tuple):
        for inner in value:
            yield from texts_in(inner)


@dataclass(frozen=True, kw_only=True)
class RecordDataset:
    """Map-style: `len`, `[i] -> Sample`; `records.read(i)` is the same without the image.

    `task` overrides what records say; `default_task` and `split` stand in where they say nothing.
    `prompt` is a template around `{question}`. `ocr` reads the words of samples whose file has none.
    """

    records: Records
    source: str
    default_task: str
    task: str | None = None
    expert: str | None = None
    split: str | None = None
    prompt: str = "{question}"
    instruction: str = ""
    num_samples: int | None = None
    ocr: OcrSource | None = None

    def __len__(self) -> int:
        whole = len(self.records)
        return whole if self.num_samples is None else min(whole, self.num_samples)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record, where = self.records.read(index)
        sample = self._sample(record, where)
        check_sample(sample, needs_answer=False, where=where)
        return sample

    def lengths(self, index: int) -> tuple[int, int]:
        """Images, and letters of questions and answers, without opening the image."""
        record, _ = self.records.read(index)
        said = [record.system, record.question, max(record.answers, key=len, default="")]
        said += [words for turn in record.turns for words in (turn.question, turn.answer)]
        return len(record.images), sum(map(len, said))

    def _sample(self, record: Record, where: str) -> Sample:
        images = [open_image(stored, where) for stored in record.images]
        sizes = [image.size for image in images] or [(1, 1)]
        check_words(record.ocr or (), where, len(images))  # before they are cut at the edges
        ocr = None if record.ocr is None else tuple(fitted(w, record.frame, sizes[w.image]) for w in record.ocr)
        if ocr is None and self.ocr is not None:
            ocr = words_on(images, self.ocr)
        boxed = 0 if record.box_image is None and not record.more_images else record.box_image
        size = dict(enumerate(sizes)).get(boxed or 0, sizes[0])  # a number of no image is refused with the sample
        boxes = [clip_if_near(scaled(b, record.frame or size, size), size, record.slack) for b in record.boxes]
        own: dict[str, Any] = {key: getattr(record, key) for key in SAME}
        own |= {key: getattr(self, key) for key in ("source", "expert", "instruction")}
        own |= {"question": self.prompt.replace("{question}", record.question)}
        own |= {"task": self.task or record.task or self.default_task}
        own |= {"split": record.split or self.split}
        own |= {"more_images": tuple(images[1:]), "box_image": boxed}
        return Sample(image=images[0] if images else None, boxes=tuple(boxes), ocr=ocr, **own)


def scaled(box: Box, frame: tuple[float, float], size: tuple[int, int]) -> Box:
    """A box in pixels of an image of `size`, from one in a frame of another size."""
    if frame == size:
        return box
    x, y = size[0] / frame[0], size[1] / frame[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def clip_if_near(box: Box, size: tuple[int, int], slack: float) -> Box:
    """The box cut at the image's edges, where it sticks out by no more than `slack` pixels."""
    inside = clipped(box, size)
    near = all(abs(a - b) <= slack for a, b in zip(box, inside, strict=True))  # False for NaN
    return inside if near else box


def clipped(box: Box, size: tuple[int, int]) -> Box:
    (width, height), (x0, y0, x1, y1) = size, box
    # NaN, which is not less than 0, becomes 0
    return (min(float(width), max(0.0, x0)), min(float(height), max(0.0, y0)),
            min(float(width), max(0.0, x1)), min(float(height), max(0.0, y1)))  # fmt: skip


def fitted(word: OcrWord, frame: tuple[float, float] | None, size: tuple[int, int]) -> OcrWord:
    """The word in its image's pixels, its box cut at the edges: engines read past them."""
    return replace(word, box=clipped(scaled(word.box, frame or size, size), size))
