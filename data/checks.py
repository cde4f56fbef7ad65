"""What makes a sample bad: one error that names the sample, the rule and the value.

Readers raise BadSampleError where a row cannot become a sample; collation raises it where a sample
breaks a rule. A run stops at the first one, or counts them by rule and goes on, as its config says.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from jinja2 import TemplateError

from data.boxes import check_box
from data.sample import MARK, PLACE, OcrWord, Sample

Rule = Literal[
    "unreadable row", "missing image", "broken image", "image outside folder", "image too large",
    "empty question", "template as question", "empty answer", "unknown task", "unknown expert", "unknown class",
    "box outside image", "box hidden by crop", "box without image", "broken OCR word", "image places", "several images",
    "image token in text", "special token in text", "refused by processor", "too long",
]  # fmt: skip
# What processors and templates raise for a sample that they cannot take.
REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, TemplateError)


class BadSampleError(ValueError):
    """`where` is a file and row, or a source and sample; `rule` is what skipped samples count by."""

    def __init__(self, where: str, rule: Rule, detail: str = ""):
        super().__init__(where, rule, detail)  # as args, so that it survives pickling by a worker
        self.where, self.rule, self.detail = where, rule, detail

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.rule}{': ' if self.detail else ''}{self.detail}")


def one_line(text: str) -> str:
    """A message that quotes a file, with what cannot be printed (line breaks, half characters) escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RefusedError(ValueError):
    """A processor or its chat template does not take some sample of a batch."""


@contextmanager
def refusals() -> Iterator[None]:
    """Inside, what a processor raises becomes a RefusedError of one line."""
    try:
        yield
    except REFUSALS as error:
        first, *_ = str(error).splitlines() or [""]
        raise RefusedError(first or type(error).__name__) from error


def name_of(sample: Sample) -> str:
    return f"source {sample.source!r}, sample {sample.id}"


def check_sample(
    sample: Sample,
    *,
    tasks: Collection[str] | None = None,
    experts: Collection[str] | None = None,
    needs_answer: bool = True,
    where: str | None = None,
) -> None:
    """BadSampleError for the first rule that the sample breaks; `tasks` and `experts` are known names, None: all."""
    where = where or name_of(sample)
    if not has_words(sample.question):
        raise BadSampleError(where, "empty question")
    if needs_answer and not sample.boxes and not any(a.strip() for a in sample.answers):
        raise BadSampleError(where, "empty answer", f"answers={sample.answers!r} and no box")
    for number, turn in enumerate(sample.turns, start=2):  # the first is question and answers
        if not has_words(turn.question):
            raise BadSampleError(where, "empty question", f"turn {number}")
        if not turn.answer.strip():
            raise BadSampleError(where, "empty answer", f"turn {number}")
    if tasks is not None and sample.task not in tasks:
        raise BadSampleError(where, "unknown task", f"{sample.task!r}; choices: {[*tasks]}")
    if experts is not None and sample.expert is not None and sample.expert not in experts:
        raise BadSampleError(where, "unknown expert", f"{sample.expert!r}; choices: {[*experts]}")
    asked = [sample.question, *(turn.question for turn in sample.turns)]
    count, places = len(sample.images), "".join(asked).count(PLACE)
    if places not in (0, count):
        raise BadSampleError(where, "image places", f"{places} times {MARK} for {count} images")
    if (sample.boxes or sample.box_image) and sample.box_image not in range(count):
        detail = f"boxes lie in one of {count} images, given by its number from 0; got {sample.box_image}"
        raise BadSampleError(where, "box without image", detail)
    for box in sample.boxes:
        try:
            check_box(box, *sample.size)
        except ValueError as error:
            raise BadSampleError(where, "box outside image", str(error)) from None
    check_words(sample.ocr or (), where, count)


def has_words(question: str) -> bool:
    return bool(question.replace(PLACE, "").strip())


def check_words(words: Sequence[OcrWord], where: str, num_images: int) -> None:
    """Raise BadSampleError for a box that is not finite, a confidence outside [0, 1], or an image that is not there."""
    for word in words:
        if word.image not in range(max(1, num_images)):
            detail = f"{word.text!r:.40}: image must be the number of one of {num_images}, from 0, got {word.image}"
            raise BadSampleError(where, "broken OCR word", detail)
        if not all(map(math.isfinite, word.box)):
            detail = f"{word.text!r:.40}: box must be four finite numbers, got {word.box}"
            raise BadSampleError(where, "broken OCR word", detail)
        if not 0 <= word.confidence <= 1:  # also for NaN
            detail = f"{word.text!r:.40}: confidence must lie in [0, 1], got {word.confidence}"
            raise BadSampleError(where, "broken OCR word", detail)
