"""The batch that the collator hands to the model: tensors with masks, and their samples.

Axis words: `batch` samples, `rows` of tokens (a sample each, or several where they are packed), `seq` tokens of prompt
and answer, `images` images, `text` question tokens, `words` OCR words, `chars` token ids of one OCR word.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from data.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the backbone reads (first block) and what only the router sees (second block).

    `labels` are -100 where nothing is supervised, and None for generation. `pixel_values` are as the processor gives
    them, [images, 3, height, width] for LLaVA-1.5, and `image_inputs` what it gives beside them (image_sizes,
    image_grid_thw ...). `image_index` names the sample of each image; it is empty where the only image is a blank one
    that is in no prompt, which keeps the tower at work on every rank. `segments` names the sample of each token where
    rows are packed (-1 at padding); then samples are numbered in the order in which they stand. `text_ids` is the
    question alone: no OCR words, no task prefix, no answer. `ocr_boxes` are x0 y0 x1 y1 in 0..1 of the image.
    `task_ids` is -1 where there is no task or it is withheld, `UNKNOWN_TASK` where it is none of the run's;
    `expert_ids` is -1 where it is unknown. Masks are True where there is something; a sample without OCR evidence has
    an all-False `ocr_mask`.
    """

    input_ids: Tensor  # [rows, seq] int64
    attention_mask: Tensor  # [rows, seq] int64
    labels: Tensor | None = None  # [rows, seq] int64
    segments: Tensor | None = None  # [rows, seq] int64
    pixel_values: Tensor
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    image_index: Tensor  # [images] int64

    text_ids: Tensor  # [batch, text] int64
    text_mask: Tensor  # [batch, text] bool
    ocr_ids: Tensor  # [batch, words, chars] int64
    ocr_char_mask: Tensor  # [batch, words, chars] bool
    ocr_boxes: Tensor  # [batch, words, 4] float
    ocr_confidence: Tensor  # [batch, words] float
    ocr_mask: Tensor  # [batch, words] bool
    task_ids: Tensor  # [batch] int64
    expert_ids: Tensor  # [batch] int64
    image_mask: Tensor  # [batch] bool

    samples: list[Sample] = field(default_factory=list)

    def __len__(self) -> int:
        return self.text_ids.shape[0]

    def token_samples(self) -> Tensor:
        """[rows, seq]: the sample of each token, -1 at padding."""
        if self.segments is not None:
            return self.segments
        samples = torch.arange(len(self), device=self.input_ids.device)[:, None]
        return samples.expand_as(self.input_ids).masked_fill(self.attention_mask == 0, -1)

    @property
    def is_blank(self) -> bool:
        """Whether the image in `pixel_values` is in no prompt."""
        return len(self.image_index) == 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch with every tensor on `device`; the samples stay where they are."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; a loader calls this by its name."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        every = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors: dict[str, Any] = {k: change(v) for k, v in every.items() if isinstance(v, Tensor)}
        inputs = {name: change(value) for name, value in self.image_inputs.items()}
        return replace(self, **tensors, image_inputs=inputs)
