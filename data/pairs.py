"""Samples -> PairBatch: images with their texts, for dual encoders such as CLIP.

    question "a photo of a {}" + answer "cat"      -> "a photo of a cat"
    question "describe the picture" + a caption    -> the caption

A question of several lines is several templates. Gates are decided for each tower by itself: if a
text could reach an image's gates, comparing gates would lower the loss. `only_images` and
`only_texts` are the two halves of a batch, each without what the other one knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from data.batch import Batch
from data.checks import BadSampleError, name_of, refusals
from data.collate import Collator, evidence_of, no_words
from data.sample import Sample


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """A batch whose row i is an image and its text. Equal keys mean equal texts, images, sources."""

    text_keys: Tensor  # [batch] int64
    image_keys: Tensor  # [batch] int64
    source_keys: Tensor  # [batch] int64


@dataclass(frozen=True, kw_only=True)
class PairCollator(Collator):
    """The collator of a dual encoder, of a `ClipProcessor` and the `context_length` that its text tower reads."""

    context_length: int

    @property
    def max_length(self) -> int:
        return min(self.context_length, self.settings.max_length)

    def error_of(self, sample: Sample) -> BadSampleError | None:
        if error := super().error_of(sample):
            return error
        if sample.image is None:
            return BadSampleError(name_of(sample), "missing image", "a pair needs an image")
        if sample.more_images:
            detail = f"has {len(sample.images)}, and a CLIP compares one image with a text; make a row of each"
            return BadSampleError(name_of(sample), "several images", detail)
        answer = sample.answers[0] if sample.answers else ""
        if not answer.strip():
            return BadSampleError(name_of(sample), "empty answer", "a pair needs a text")
        if sample.choices and answer not in sample.choices:
            detail = f"{answer!r} is not among the {len(sample.choices)} names of its data set"
            return BadSampleError(name_of(sample), "unknown class", detail)
        return None

    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        texts = [self.text(sample) for sample in samples]
        with refusals():
            pixels = self.processor.images([sample.image for sample in samples])
            ids = self.processor.tokens(texts)
            return {"input_ids": ids, "pixel_values": pixels, "texts": texts}

    def batch(self, samples: list[Sample], encoded: dict[str, Any]) -> PairBatch:
        text = read_by_both(*self.processor.padded(encoded["input_ids"]))
        return PairBatch(
            pixel_values=encoded["pixel_values"],
            image_index=torch.arange(len(samples)),
            image_mask=torch.ones(len(samples), dtype=torch.bool),
            text_keys=keys(encoded["texts"]),
            image_keys=keys([sample.image_id for sample in samples]),
            source_keys=keys([sample.source for sample in samples]),
            **text,
            **evidence_of(self, samples),
        )

    def text(self, sample: Sample) -> str:
        """What the sample's image is taught to match; which of its templates follows from its id."""
        found = templates(sample.question)
        template = found[crc32(sample.id.encode()) % len(found)]
        return fill(template, sample.answers[0])

    def text_batch(self, texts: Sequence[str], like: Sample) -> Batch:
        """Texts alone, of the task and the expert of a sample, for evaluation."""
        text, rows = read_by_both(*self.processor.texts(texts)), len(texts)
        return Batch(
            pixel_values=torch.zeros(0, 3, 1, 1),
            image_index=torch.zeros(0, dtype=torch.long),
            image_mask=torch.zeros(rows, dtype=torch.bool),
            task_ids=torch.full((rows,), self.task_id(like)),
            expert_ids=torch.full((rows,), self.expert_id(like)),
            **text,
            **no_words(rows),
        )


def read_by_both(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """The text, for the text tower and for the router."""
    return {"input_ids": ids, "attention_mask": mask, "text_ids": ids, "text_mask": mask.bool()}


def templates(question: str) -> list[str]:
    return [line.strip() for line in question.split("\n") if line.strip()]


def fill(template: str, name: str) -> str:
    """The template with the name in it; the name alone where the template has no place for one."""
    return template.replace("{}", name) if "{}" in template else name


def keys(values: Sequence[str]) -> Tensor:
    """[values] int64, equal for equal strings on every machine."""
    digests = (blake2b(value.encode(), digest_size=8).digest() for value in values)
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def only_images(batch: Batch) -> Batch:
    """The images with the OCR words that are on them and the task; no text."""
    return replace(batch, text_mask=torch.zeros_like(batch.text_mask))


def only_texts(batch: Batch) -> Batch:
    """The texts and the task; no image, nor anything read from one."""
    left: dict[str, Any] = {k: getattr(batch, k)[:0] for k in ("pixel_values", "image_index")}
    left |= {k: torch.zeros_like(getattr(batch, k)) for k in ("image_mask", "ocr_mask")}
    return replace(batch, **left)
