"""Samples -> Batch: token ids, answer-only labels, images, and the router's evidence.

    conversation (data/prompt.py)       ->  chat template, processor  ->  input_ids, labels, pixel_values
    question | OCR words | task, expert ->  what the router alone sees

Nothing is truncated: cutting a sequence may cut image tokens, which no model survives. A sample
longer than `max_length` is a bad sample like any other.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL.Image import new as new_image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.batch import Batch
from data.chat import ChatEncoder, check_parts, images_of
from data.checks import BadSampleError, RefusedError, name_of, refusals
from data.prompt import Evidence, Prompt
from data.sample import PLACE, Sample

IGNORED = -100  # label of a token that is not supervised
# What a processor gives of the text; everything else is of the images.
TEXT_INPUTS = {
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "assistant_masks", "labels", "num_images",
}  # fmt: skip


class Collator(Evidence, ABC):
    """Makes batches of the samples that it can take; the same object for any number of workers."""

    @property
    def max_length(self) -> int:
        return self.settings.max_length

    @abstractmethod
    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """`input_ids` of unequal length, and what `batch` needs beside them."""

    @abstractmethod
    def batch(self, samples: list[Sample], encoded: dict[str, Any]) -> Any:
        """The model's input, from what `encode` gave of the same samples."""

    @abstractmethod
    def text(self, sample: Sample) -> str:
        """What is tokenised of the sample, but for later turns."""

    def __call__(self, samples: Sequence[Sample]) -> Any:
        """The batch of all samples; BadSampleError for the first bad one."""
        batch, rejected = self.split(samples)
        if rejected:
            raise rejected[0]
        return batch

    def split(self, items: Sequence[Sample | BadSampleError]) -> tuple[Any, list[BadSampleError]]:
        """The batch of the good samples (None without any), and an error for each bad one, readers' among them."""
        good: list[Sample] = []
        rejected: list[BadSampleError] = []
        for item in items:
            if isinstance(item, BadSampleError):
                rejected.append(item)
            elif error := self.error_of(item):
                rejected.append(error)
            else:
                good.append(item)
        good, encoded, refused = self._encode_each(good)
        rejected += refused
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if max(lengths, default=0) > self.max_length:
            pairs, limit = [*zip(good, lengths, strict=True)], f"max_length={self.max_length}"
            long = [(s, n) for s, n in pairs if n > self.max_length]
            rejected += [BadSampleError(name_of(s), "too long", f"{n} tokens; {limit}") for s, n in long]
            good = [s for s, n in pairs if n <= self.max_length]
            encoded = self.encode(good) if good else {}
        return (self.batch(good, encoded) if good else None), rejected

    def num_tokens(self, sample: Sample) -> int:
        """Of the whole sequence: template, image, prompt and answer. BadSampleError if refused."""
        _, encoded, refused = self._encode_each([sample])
        if refused:
            raise refused[0]
        return len(encoded["input_ids"][0])

    def _encode_each(self, samples: list[Sample]) -> tuple[list[Sample], dict[str, Any], list[BadSampleError]]:
        """The samples that the processor takes, encoded, and an error for each that it refuses."""
        nothing: dict[str, Any] = {"input_ids": []}
        try:
            return samples, self.encode(samples) if samples else nothing, []
        except RefusedError:
            refused = {i: error for i, s in enumerate(samples) if (error := self._refusal(s))}
            if not refused:  # it is the batch that the processor refuses
                raise
        taken = [sample for i, sample in enumerate(samples) if i not in refused]
        return taken, self.encode(taken) if taken else nothing, [*refused.values()]

    def _refusal(self, sample: Sample) -> BadSampleError | None:
        try:
            self.encode([sample])
        except RefusedError as error:
            return BadSampleError(name_of(sample), "refused by processor", str(error))
        return None


@dataclass(frozen=True, kw_only=True)
class ChatCollator(Prompt, Collator):
    """Makes batches of conversations with a Hugging Face processor.

    `stops` are ids that end generation besides the tokenizer's own end token.
    With `pack_length` a row of tokens holds several samples, as many of them as fit, in their order.
    With `for_generation` there are no labels, padding is on the left, and a row is a sample.
    """

    stops: tuple[int, ...] = ()
    pack_length: int | None = None

    @cached_property
    def _encoder(self) -> ChatEncoder:
        check_parts(self.processor)
        return ChatEncoder(self.processor, self.stops)

    def encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Token ids and assistant masks as lists of unequal length, the images, and the number of each sample's."""
        encoder = self._encoder
        chats = [self.conversation(sample) for sample in samples]
        images = [images_of(chat) for chat in chats]
        with refusals():
            encoded = encoder.encode(chats, images, prompts=self.for_generation)
        return {**encoded, "num_images": [*map(len, images)]}

    def batch(self, samples: list[Sample], encoded: dict[str, Any]) -> Batch:
        tokenizer, tokens = self.processor.tokenizer, encoded["input_ids"]
        packs = self.pack_length is not None and not self.for_generation
        rows = [range(i, i + 1) for i in range(len(tokens))]
        if self.pack_length is not None and packs:
            rows = fill_rows([*map(len, tokens)], self.pack_length)
        ids, mask = pad(joined(tokens, rows), tokenizer.pad_token_id, left=self.for_generation)
        labels = segments = None
        if not self.for_generation:
            supervised, _ = pad(joined(encoded["assistant_masks"], rows), 0)
            labels = ids.masked_fill(supervised == 0, IGNORED)
        if packs:
            numbers = [[i] * len(row) for i, row in enumerate(tokens)]
            segments, _ = pad(joined(numbers, rows), -1)
        asked = [sample.question.replace(PLACE, "") for sample in samples]
        questions = tokenizer(asked, add_special_tokens=False)["input_ids"]
        text_ids, text_mask = pad(questions, tokenizer.pad_token_id)
        text: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        text |= {"segments": segments, "text_ids": text_ids, "text_mask": text_mask}
        return Batch(**text, **self._images(encoded), **evidence_of(self, samples))

    def _images(self, encoded: dict[str, Any]) -> dict[str, Any]:
        """What the processor made of the images, and the sample of each.

        A batch without any gets a blank one that is in no prompt: vision layers that learn must
        take part on every rank.
        """
        counts = torch.tensor(encoded["num_images"])
        if not counts.any():
            blank = new_image("RGB", (64, 64), "gray")
            encoded = self.processor(text=[self.processor.image_token], images=[[blank]])
        kept = {k: v for k, v in encoded.items() if k not in TEXT_INPUTS and v is not None}
        inputs = {name: stack_images(value) for name, value in kept.items()}
        found = {"pixel_values": inputs.pop("pixel_values"), "image_inputs": inputs}
        return {**found, "image_index": torch.arange(len(counts)).repeat_interleave(counts), "image_mask": counts > 0}


def evidence_of(collator: Evidence, samples: list[Sample]) -> dict[str, Any]:
    """The router's fields of a batch: tasks, experts, OCR words; without any, one masked word of one masked token."""
    words = [collator.words(sample) for sample in samples]
    flat = [word.text for row in words for word in row]
    tokenizer = collator.processor.tokenizer
    tokens = tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
    char_ids, char_mask = pad(tokens or [[]], tokenizer.pad_token_id)
    out = no_words(len(samples), max(1, max(map(len, words))), char_ids.shape[1])
    out["ocr_ids"] += tokenizer.pad_token_id
    start = 0
    for row, (sample, found) in enumerate(zip(samples, words, strict=True)):
        count, stop = len(found), start + len(found)
        if found:
            frames = [collator.framing(*image.size) for image in sample.images]
            size = torch.tensor([2 * frames[w.image].size for w in found])
            out["ocr_ids"][row, :count] = char_ids[start:stop]
            out["ocr_char_mask"][row, :count] = char_mask[start:stop]
            out["ocr_boxes"][row, :count] = torch.tensor([frames[w.image].to_frame(w.box) for w in found]) / size
            out["ocr_confidence"][row, :count] = torch.tensor([w.confidence for w in found])
            out["ocr_mask"][row, :count] = True
        start = stop
    task_ids = torch.tensor([collator.task_id(sample) for sample in samples])
    expert_ids = torch.tensor([collator.expert_id(sample) for sample in samples])
    return {**out, "task_ids": task_ids, "expert_ids": expert_ids, "samples": samples}


def no_words(rows: int, words: int = 1, chars: int = 1) -> dict[str, Any]:
    return {
        "ocr_ids": torch.zeros(rows, words, chars, dtype=torch.long),
        "ocr_char_mask": torch.zeros(rows, words, chars, dtype=torch.bool),
        "ocr_boxes": torch.zeros(rows, words, 4),
        "ocr_confidence": torch.zeros(rows, words),
        "ocr_mask": torch.zeros(rows, words, dtype=torch.bool),
    }


def stack_images(images: Any) -> Tensor:
    """`[images, 3, height, width]` of an image processor's lists; unequally many tiles are filled up with zeros."""
    if isinstance(images, Tensor):
        return images
    tensors = [torch.as_tensor(np.asarray(image)) for image in images]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        return pad_sequence(tensors, batch_first=True)
    return torch.stack(tensors)


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """`[rows, longest]` int64 and its bool mask; at least one column, so that no axis is empty."""
    longest = max(1, *map(len, rows))
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        padded[i, where], mask[i, where] = row, True
    return torch.from_numpy(padded), torch.from_numpy(mask)


def fill_rows(lengths: Sequence[int], capacity: int) -> list[range]:
    """Samples in order in the fewest rows of `capacity` tokens, evenly filled, as all are padded to the longest."""
    few = len(fill_in_turn(lengths, capacity))
    possible = range(max(lengths), capacity)
    even = bisect_left(possible, True, key=lambda c: len(fill_in_turn(lengths, c)) <= few)
    return fill_in_turn(lengths, even + max(lengths))


def fill_in_turn(lengths: Sequence[int], capacity: int) -> list[range]:
    """Each sample in the row of the one before it while they fit; none is cut."""
    firsts, filled = [0], 0
    for number, length in enumerate(lengths):
        if filled and filled + length > capacity:
            firsts.append(number)
            filled = 0
        filled += length
    return [range(*pair) for pair in pairwise([*firsts, len(lengths)])]


def joined(sequences: Sequence[Sequence[int]], rows: Sequence[range]) -> list[list[int]]:
    """The sequences of each row, one behind the other."""
    return [[token for number in row for token in sequences[number]] for row in rows]
