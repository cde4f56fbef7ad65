"""A batch of the shape that a run will meet: ids and masks are real, pixels are left to the caller."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from moa.backbones.families import FAMILIES
from moa.backbones.llava import Backbone
from moa.config import RunConfig
from moa.sections import ModelConfig

OCR_CHARS = 8  # tokens of an OCR word


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What a sample is taken to be: images, a question, an answer, in tokens together."""

    tokens: int  # of prompt, images and answer
    answer: int  # of them supervised
    image: int  # of them those of one image
    images: int = 1
    pack: int | None = None  # tokens of a row that several samples share

    def __post_init__(self) -> None:
        if self.answer < 1 or self.question < self.images:  # a token stands behind each image
            raise ValueError(
                f"length: {self.tokens} tokens leave {self.question} for the question, after {self.images} x "
                f"{self.image} of the image and {self.answer} of the answer"
            )
        if self.pack is not None and self.pack < self.tokens:
            raise ValueError(f"length: {self.tokens} must fit train.pack_length={self.pack}")

    @property
    def question(self) -> int:
        return self.tokens - self.images * self.image - self.answer


@torch.no_grad()
def image_tokens(backbone: Backbone, model: ModelConfig) -> int:
    """Tokens that one image becomes, by a backbone without experts."""
    base = backbone.model.config
    if FAMILIES[base.model_type].rows == "patches":
        return (patches_per_side(base, model) // base.vision_config.spatial_merge_size) ** 2
    pixels = blank_images(base, model, 1)["pixel_values"].to(backbone.dtype)
    found = backbone.model.model.get_image_features(pixel_values=pixels, return_dict=True)
    return sum(len(entry.flatten(0, -2)) for entry in found.pooler_output)


def blank_images(base: Any, model: ModelConfig, count: int) -> dict[str, Any]:
    """`pixel_values` and `image_inputs` of so many images of the size that costs most."""
    vision = base.vision_config
    if FAMILIES[base.model_type].rows == "patches":
        side = patches_per_side(base, model)
        width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]] * count)
        pixels = torch.zeros(count * side**2, width)
        return {"pixel_values": pixels, "image_inputs": {"image_grid_thw": grid}}
    side = vision.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return {"pixel_values": torch.zeros(count, 3, height, width)}


def patches_per_side(base: Any, model: ModelConfig) -> int:
    """Of a square image with the most pixels that the processor lets through."""
    size = (model.image_processor or {}).get("size", {})
    if "longest_edge" not in size:
        raise ValueError(
            f"model.image_processor.size.longest_edge: a {base.model_type} makes tokens of an image "
            "by its size; give the most pixels of one, such as 802816, to plan for it"
        )
    merge = base.vision_config.spatial_merge_size
    return int(size["longest_edge"] ** 0.5) // (base.vision_config.patch_size * merge) * merge


def example_batch(config: RunConfig, base: Any, lengths: Lengths, num_samples: int) -> Batch:
    """Samples of equal length in rows; the last row is one token short.

    A single padded token makes attention keep a mask, as a real batch does. `base` is the backbone's config.
    """
    image, count, words = base.image_token_id, num_samples, config.prompt.max_ocr_words
    sample = torch.full((lengths.tokens,), 2 if image != 2 else 3)
    for start in range(0, lengths.images * (lengths.image + 1), lengths.image + 1):
        sample[start : start + lengths.image] = image
    labels = torch.full_like(sample, -100)
    labels[-lengths.answer :] = sample[-1]
    ids, targets, segments = in_rows(sample, labels, count, lengths.pack)
    mask = (segments >= 0).long()
    if lengths.pack is None and count > 1:
        mask[-1, -1], targets[-1, -1] = 0, -100
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=targets,
        segments=segments if lengths.pack is not None else None,
        **blank_images(base, config.model, count * lengths.images),
        image_index=torch.arange(count).repeat_interleave(lengths.images),
        text_ids=torch.full((count, lengths.question), int(sample[-1])),
        text_mask=torch.ones(count, lengths.question, dtype=torch.bool),
        ocr_ids=torch.full((count, words, OCR_CHARS), int(sample[-1])),
        ocr_char_mask=torch.ones(count, words, OCR_CHARS, dtype=torch.bool),
        ocr_boxes=torch.zeros(count, words, 4),
        ocr_confidence=torch.ones(count, words),
        ocr_mask=torch.ones(count, words, dtype=torch.bool),
        task_ids=torch.arange(count) % len(config.data.tasks),
        expert_ids=torch.arange(count) % len(config.experts),
        image_mask=torch.ones(count, dtype=torch.bool),
    )


def in_rows(sample: Tensor, labels: Tensor, count: int, pack: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and segments [rows, seq] of `count` copies; a row each without `pack`."""
    length = len(sample)
    per_row = 1 if pack is None else pack // length
    rows, width = -(-count // per_row), pack or length
    ids = torch.zeros(rows, width, dtype=torch.long)
    targets, segments = torch.full_like(ids, -100), torch.full_like(ids, -1)
    for number in range(count):
        row, place = divmod(number, per_row)
        here = slice(place * length, (place + 1) * length)
        ids[row, here], targets[row, here], segments[row, here] = sample, labels, number
    return ids, targets, segments
