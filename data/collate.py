"""Samples -> Batch: chat template, answer-only labels, images, and the router's evidence.

    [task] question <OCR words>  ->  processor.apply_chat_template  ->  input_ids, labels
    question | OCR words with boxes | task                          ->  what the router alone sees

Nothing is truncated: cutting a sequence may cut image tokens, which no model survives. A sample
longer than `max_length` is a bad sample like any other.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
import torch
from PIL.Image import new as new_image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.batch import Batch
from data.boxes import CODECS, BoxCodec
from data.chat import ChatEncoder, check_parts, message, special_tokens
from data.checks import BadSampleError, RefusedError, check_sample, name_of, refusals
from data.geometry import Geometry, seen_by
from data.rows import fill_rows, joined, pad
from data.sample import OcrWord, Sample

IGNORED = -100  # label of a token that is not supervised
# What a processor gives of the text; everything else is of the images.
TEXT_INPUTS = {
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "assistant_masks", "labels",
}  # fmt: skip


def chosen_words(sample: Sample, limit: int) -> list[OcrWord]:
    """The `limit` most confident OCR words, in their own (reading) order."""
    words = sample.ocr or ()
    best = sorted(range(len(words)), key=lambda i: -words[i].confidence)[:limit]
    return [words[i] for i in sorted(best)]


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What data must know of a base: its processor, how it writes boxes (a name in CODECS, None
    if unknown), whether it takes text alone, and the ids that end generation."""

    processor: Any
    box_codec: str | None = None
    text_only: bool = True
    stops: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches; the same object for any number of worker processes.

    `processor` is a Hugging Face processor; data/chat.py says how answers are found in its tokens.
    `codec` writes boxes; None is for data without any. Without `text_only` a sample needs an image.
    `stops` are ids that end generation besides the tokenizer's own end token.
    `tasks` and `experts` are the names behind `task_ids` and `expert_ids`.
    With `withhold_task` neither prompt nor router learns the task. `allow_unknown_tasks` is for
    held-out tasks: they get id -1, and their prefix in the prompt as any other.
    `task_dropout` is the share of training samples whose task is withheld all the same, so that
    prompt and router learn to do without; which ones is a function of the sample's id.
    A box of which the processor's crop leaves less than the share `min_visible` is a bad sample.
    With `pack_length` a row of tokens holds several samples, as many of them as fit, in their order.
    With `for_generation` there are no labels, padding is on the left, and a row is a sample.
    """

    processor: Any
    tasks: Sequence[str]
    experts: Sequence[str]
    codec: BoxCodec | None
    text_only: bool = True
    stops: tuple[int, ...] = ()
    task_in_prompt: bool = True
    ocr_in_prompt: bool = True
    task_template: str = "[{task}] "
    ocr_template: str = "\nReference OCR token: {words}"
    ocr_separator: str = " "
    max_length: int = 2048
    max_ocr_words: int = 64
    min_visible: float = 1.0
    pack_length: int | None = None
    for_generation: bool = False
    withhold_task: bool = False
    task_dropout: float = 0.0
    allow_unknown_tasks: bool = False

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of all samples; BadSampleError for the first bad one."""
        batch, rejected = self.split(samples)
        if rejected:
            raise rejected[0]
        assert batch is not None  # nothing was rejected
        return batch

    def split(
        self, items: Sequence[Sample | BadSampleError]
    ) -> tuple[Batch | None, list[BadSampleError]]:
        """The batch of the good samples (None if there is none) and an error for each bad one.

        Readers' errors may stand among the samples; they are passed on.
        """
        good: list[Sample] = []
        rejected: list[BadSampleError] = []
        for item in items:
            if isinstance(item, BadSampleError):
                rejected.append(item)
            elif error := self.error_of(item):
                rejected.append(error)
            else:
                good.append(item)
        if not good:
            return None, rejected
        good, encoded, refused = self._encode_each(good)
        rejected += refused
        if encoded is None:
            return None, rejected
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if max(lengths) > self.max_length:
            rejected += [
                BadSampleError(name_of(s), "too long", f"{n} tokens; max_length={self.max_length}")
                for s, n in zip(good, lengths, strict=True)
                if n > self.max_length
            ]
            fitting = [s for s, n in zip(good, lengths, strict=True) if n <= self.max_length]
            return (self._batch(fitting, self._encode(fitting)) if fitting else None), rejected
        return self._batch(good, encoded), rejected

    def error_of(self, sample: Sample) -> BadSampleError | None:
        """The rule that the sample breaks before it is tokenised, if any."""
        if error := self._token_in_text(sample):
            return error
        try:
            check_sample(
                sample,
                tasks=None if self.allow_unknown_tasks else self.tasks,
                experts=self.experts,
                needs_answer=not self.for_generation,
            )
        except BadSampleError as error:
            return error
        if sample.image is None and not self.text_only:
            detail = "this base reads no text without an image"
            return BadSampleError(name_of(sample), "missing image", detail)
        return self._hidden_box(sample)

    def _token_in_text(self, sample: Sample) -> BadSampleError | None:
        """The error of a token that data may not write, since it would not be read as text."""
        said = [word for turn in sample.turns for word in (turn.question, turn.answer)]
        words = [word.text for word in chosen_words(sample, self.max_ocr_words)]
        learned = [] if self.for_generation else [*sample.answers, *said]
        asked = [sample.system, sample.task, sample.question, sample.instruction, *words]
        found = self._special.search("\n".join([*asked, *learned]))
        if found is None:
            return None
        if found[0] == getattr(self.processor, "image_token", None):
            detail = f"{found[0]!r} stands for an image; rename it"
            return BadSampleError(name_of(sample), "image token in text", detail)
        detail = f"{found[0]!r} is a special token of the base, not text; rename or remove it"
        return BadSampleError(name_of(sample), "special token in text", detail)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Finds special tokens but those that boxes are written with."""
        codec = self.codec
        tokens = (
            token
            for token in special_tokens(self.processor)
            if codec is None or not codec.writes(token)
        )
        return re.compile("|".join(map(re.escape, sorted(tokens, reverse=True))) or "(?!)")

    @property
    def box_codec(self) -> BoxCodec:
        """The convention for boxes; ValueError where there is none."""
        if self.codec is None:
            raise ValueError(
                "prompt.box_codec: auto, and nobody knows how this base was taught to write boxes; "
                f"choices: {', '.join(CODECS)}"
            )
        return self.codec

    def geometry(self, sample: Sample) -> Geometry:
        """Where the sample's image goes on its way to the model."""
        return seen_by(self.processor.image_processor, *sample.size)

    def _hidden_box(self, sample: Sample) -> BadSampleError | None:
        if not sample.boxes:
            return None
        hidden = max(map(self.geometry(sample).hidden, sample.boxes))
        if hidden <= 1 - self.min_visible + 1e-6:  # as much as the crop's rounding
            return None
        detail = (
            f"{hidden:.0%} of a box; let the processor pad (do_pad) or resize, or accept it by "
            f"prompt.min_visible={self.min_visible:g}"
        )
        return BadSampleError(name_of(sample), "box hidden by crop", detail)

    def prompt(self, sample: Sample) -> str:
        """The text of the user's turn; every word that the language model reads but the answer."""
        task = self.task_template.format(task=sample.task)
        chosen = chosen_words(sample, self.max_ocr_words)
        words = self.ocr_separator.join(word.text for word in chosen)
        return (
            ("" if self.withholds(sample) or not self.task_in_prompt else task)
            + sample.question
            + (self.ocr_template.format(words=words) if self.ocr_in_prompt and words else "")
            + (f"\n{sample.instruction}" if sample.instruction else "")
        )

    def target(self, sample: Sample) -> str:
        """What the model learns to say: the most frequent answer (the first of equals), or the boxes."""
        answers = [answer for answer in sample.answers if answer.strip()]
        if answers:
            return Counter(answers).most_common(1)[0][0]
        return self.box_codec.encode(sample.boxes, self.geometry(sample))

    def conversation(self, sample: Sample) -> list[dict[str, Any]]:
        """The whole conversation to learn from, or its first question to answer."""
        image = [] if sample.image is None else [{"type": "image", "image": sample.image}]
        system = [message("system", sample.system)] if sample.system else []
        opening = [*system, message("user", self.prompt(sample), image)]
        if self.for_generation:
            return opening
        answered = [*opening, message("assistant", self.target(sample).strip())]
        for turn in sample.turns:
            answered += [message("user", turn.question), message("assistant", turn.answer.strip())]
        return answered

    def num_tokens(self, sample: Sample) -> int:
        """Of the whole sequence: template, image, prompt and answer. BadSampleError if refused."""
        _, encoded, refused = self._encode_each([sample])
        if encoded is None:
            raise refused[0]
        return len(encoded["input_ids"][0])

    def _encode_each(
        self, samples: list[Sample]
    ) -> tuple[list[Sample], dict[str, Any] | None, list[BadSampleError]]:
        """The samples that the processor takes, encoded, and an error for each that it refuses."""
        try:
            return samples, self._encode(samples), []
        except RefusedError:
            refused = {i: error for i, s in enumerate(samples) if (error := self._refusal(s))}
            if not refused:  # it is the batch that the processor refuses
                raise
        taken = [sample for i, sample in enumerate(samples) if i not in refused]
        return taken, self._encode(taken) if taken else None, [*refused.values()]

    def _refusal(self, sample: Sample) -> BadSampleError | None:
        try:
            self._encode([sample])
        except RefusedError as error:
            return BadSampleError(name_of(sample), "refused by processor", str(error))
        return None

    @cached_property
    def _encoder(self) -> ChatEncoder:
        check_parts(self.processor)
        return ChatEncoder(self.processor, self.stops)

    def _encode(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Token ids and assistant masks as lists of unequal length, and the images."""
        encoder = self._encoder
        chats = [self.conversation(sample) for sample in samples]
        images = [[s.image] if s.image is not None else [] for s in samples]
        with refusals():
            return encoder.encode(chats, images, prompts=self.for_generation)

    def _batch(self, samples: list[Sample], encoded: dict[str, Any]) -> Batch:
        tokenizer = self.processor.tokenizer
        left = self.for_generation
        rows = self._rows(list(map(len, encoded["input_ids"])))
        ids, mask = pad(joined(encoded["input_ids"], rows), tokenizer.pad_token_id, left=left)
        labels = segments = None
        if not self.for_generation:
            supervised, _ = pad(joined(encoded["assistant_masks"], rows), 0)
            labels = ids.masked_fill(supervised == 0, IGNORED)
        if self.pack_length is not None and not self.for_generation:
            owners = [[i] * len(tokens) for i, tokens in enumerate(encoded["input_ids"])]
            segments, _ = pad(joined(owners, rows), -1)
        questions = tokenizer([s.question for s in samples], add_special_tokens=False)["input_ids"]
        text_ids, text_mask = pad(questions, tokenizer.pad_token_id)
        return Batch(
            input_ids=ids,
            attention_mask=mask.long(),
            labels=labels,
            segments=segments,
            **self._images(samples, encoded),
            text_ids=text_ids,
            text_mask=text_mask,
            task_ids=torch.tensor([self._task_id(sample) for sample in samples]),
            expert_ids=torch.tensor([position(self.experts, s.expert) for s in samples]),
            samples=samples,
            **self._ocr(samples),
        )

    def _rows(self, lengths: list[int]) -> list[range]:
        """The samples of each row."""
        if self.pack_length is None or self.for_generation:
            return [range(i, i + 1) for i in range(len(lengths))]
        return fill_rows(lengths, self.pack_length)

    def _images(self, samples: list[Sample], encoded: dict[str, Any]) -> dict[str, Any]:
        """What the processor made of the images, and whose they are.

        A batch without any gets a blank one that no prompt speaks of: vision layers that learn must
        take part on every rank.
        """
        seen = torch.tensor([sample.image is not None for sample in samples])
        about = {"image_index": seen.nonzero()[:, 0], "image_mask": seen}
        if not seen.any():
            blank = new_image("RGB", (64, 64), "gray")
            encoded = self.processor(text=[self.processor.image_token], images=[[blank]])
        inputs = {
            name: stack_images(value)
            for name, value in encoded.items()
            if name not in TEXT_INPUTS and value is not None
        }
        return {
            "pixel_values": inputs.pop("pixel_values"),
            "image_inputs": inputs,
            **about,
        }

    def _task_id(self, sample: Sample) -> int:
        return -1 if self.withholds(sample) else position(self.tasks, sample.task)

    def withholds(self, sample: Sample) -> bool:
        """Whether neither prompt nor router learns the sample's task."""
        if self.withhold_task or self.for_generation:
            return self.withhold_task
        return crc32(sample.id.encode()) % 1000 < 1000 * self.task_dropout

    def _ocr(self, samples: list[Sample]) -> dict[str, Any]:
        """The router's OCR evidence; one masked word of one masked token where there is none."""
        words = [chosen_words(sample, self.max_ocr_words) for sample in samples]
        flat = [word.text for row in words for word in row]
        tokenizer = self.processor.tokenizer
        tokens = tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
        char_ids, char_mask = pad(tokens or [[]], tokenizer.pad_token_id)
        shape = (len(samples), max(1, max(map(len, words))))
        out = {
            "ocr_ids": torch.full((*shape, char_ids.shape[1]), tokenizer.pad_token_id),
            "ocr_char_mask": torch.zeros(*shape, char_ids.shape[1], dtype=torch.bool),
            "ocr_boxes": torch.zeros(*shape, 4),
            "ocr_confidence": torch.zeros(shape),
            "ocr_mask": torch.zeros(shape, dtype=torch.bool),
        }
        start = 0
        for row, (sample, found) in enumerate(zip(samples, words, strict=True)):
            count, stop = len(found), start + len(found)
            if found:
                size = torch.tensor([*sample.size, *sample.size])
                out["ocr_ids"][row, :count] = char_ids[start:stop]
                out["ocr_char_mask"][row, :count] = char_mask[start:stop]
                out["ocr_boxes"][row, :count] = torch.tensor([w.box for w in found]) / size
                out["ocr_confidence"][row, :count] = torch.tensor([w.confidence for w in found])
                out["ocr_mask"][row, :count] = True
            start = stop
        return out


def position(names: Sequence[str], name: str | None) -> int:
    return names.index(name) if name in names else -1


def stack_images(images: Any) -> Tensor:
    """`[images, 3, height, width]`, from what an image processor gives without `return_tensors`.

    Images of unequally many tiles are filled up with zeros, as processors do for tensors.
    """
    if isinstance(images, Tensor):
        return images
    tensors = [torch.as_tensor(np.asarray(image)) for image in images]
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        return pad_sequence(tensors, batch_first=True)
    return torch.stack(tensors)
