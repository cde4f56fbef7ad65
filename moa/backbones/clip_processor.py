"""Images and texts as a dual encoder reads them, for transformers' processors and open_clip's alike.

Texts come out unpadded, so that one that is too long is found and not cut. CLIP of transformers pools at the end of a
text, whatever follows; the others read padding to the whole context (`pads_to_context`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClipProcessor:
    """`tokenizer(texts)["input_ids"]` are lists of ids, `image_processor(images=...)` pixel values."""

    tokenizer: Any
    image_processor: Any
    context_length: int
    pads_to_context: bool
    original: Any = None  # transformers' processor

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text with its begin and end, of any length."""
        return [list(ids) for ids in self.tokenizer(list(texts))["input_ids"]]

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids and mask [texts, seq]; ValueError for a text beyond the context."""
        longest = max(map(len, rows))
        if longest > self.context_length:
            raise ValueError(f"a text has {longest} tokens; this text tower reads {self.context_length} tokens")
        width = self.context_length if self.pads_to_context else longest
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, found in enumerate(rows):
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return ids, mask

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.padded(self.tokens(texts))

    def images(self, images: Sequence[Image]) -> Tensor:
        """[images, 3, height, width]"""
        found = self.image_processor(images=list(images), return_tensors="pt")
        return torch.as_tensor(found["pixel_values"])

    def save_pretrained(self, folder: str | Path) -> None:
        if self.original is not None:
            self.original.save_pretrained(folder)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        described = {"context_length": self.context_length, **self.image_processor.described()}
        Path(folder, "open_clip_processor.json").write_text(json.dumps(described, indent=2) + "\n")


class OpenClipTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        inner = getattr(tokenizer, "tokenizer", None)  # of the kinds that wrap transformers'
        self.pad_token_id = 0 if inner is None else inner.pad_token_id
        self.eos_token_id = tokenizer.eot_token_id if inner is None else inner.eos_token_id
        self.context_length: int = tokenizer.context_length
        known = tokenizer if inner is None else inner
        self.all_special_tokens = getattr(known, "all_special_tokens", None) or [
            known.decoder[number] for number in known.all_special_ids
        ]

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        if not add_special_tokens and hasattr(self.tokenizer, "encode"):
            return {"input_ids": [self.tokenizer.encode(text) for text in texts]}
        # One more than the context holds: a longer text shows by it.
        rows = self.tokenizer(list(texts), context_length=self.context_length + 1).tolist()
        return {"input_ids": [self._unpadded(row) for row in rows]}

    def _unpadded(self, row: list[int]) -> list[int]:
        end = len(row)
        while end > 1 and row[end - 1] == self.pad_token_id:
            end -= 1
        # SigLIP pads with its end token: one of them is the text's own.
        return row[: min(end + 1, len(row)) if self.pad_token_id == self.eos_token_id else end]


class OpenClipImages:
    """open_clip's transform of one image, called and described as those of transformers are."""

    do_resize = True

    def __init__(self, transform: Any, visual: Any) -> None:
        self.transform = transform
        self.image_mean, self.image_std = list(visual.image_mean), list(visual.image_std)
        size = visual.image_size
        self.sides: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        height, width = self.sides
        mode = visual.preprocess_cfg.get("resize_mode") or "shortest"
        self.do_center_crop = mode == "shortest"
        self.crop_size = {"height": height, "width": width}
        edge = {f"{mode}_edge": max(self.sides)}  # open_clip fits both edges of what is not square
        self.size = self.crop_size if mode == "squash" else edge

    def __call__(self, images: Sequence[Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self.transform(image) for image in images])}

    def described(self) -> dict[str, Any]:
        return {"size": list(self.sides), "mean": self.image_mean, "std": self.image_std}


def of_transformers(processor: Any, config: Any) -> ClipProcessor:
    return ClipProcessor(
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        context_length=config.text_config.max_position_embeddings,
        pads_to_context=config.model_type != "clip",
        original=processor,
    )


def of_open_clip(tokenizer: Any, transform: Any, model: Any) -> ClipProcessor:
    wrapped = OpenClipTokenizer(tokenizer)
    return ClipProcessor(
        tokenizer=wrapped,
        image_processor=OpenClipImages(transform, model.visual),
        context_length=wrapped.context_length,
        pads_to_context=True,
    )
