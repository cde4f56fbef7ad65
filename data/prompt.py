"""The text side of a batch: what the language model reads and learns of a sample, and which samples it cannot take.

[task] question <OCR words> instruction  ->  conversation  ->  data/collate.py
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any
from zlib import crc32

from PIL import Image

from data.border import bordered, draw_border
from data.boxes import CODECS, BoxCodec
from data.chat import message, special_tokens
from data.checks import BadSampleError, check_sample, name_of
from data.config import PromptConfig
from data.geometry import Geometry, seen_by
from data.sample import PLACE, UNKNOWN_TASK, OcrWord, Sample


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What data needs from a base: its processor, how it writes boxes (a name in CODECS, None if
    unknown), whether it takes text alone, why it takes no more than one image a sample (empty where
    it does), the ids that end generation, and for a dual encoder the tokens that its text tower reads."""

    processor: Any
    box_codec: str | None = None
    text_only: bool = True
    one_image: str = ""
    stops: tuple[int, ...] = ()
    context_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What every model is given beside its texts: OCR words, task and expert.

    `tasks` and `experts` are the names behind `task_ids` and `expert_ids`.
    With `withhold_task` neither prompt nor router gets the task. `allow_unknown_tasks` is for
    held-out tasks: they get id -1, and their prefix in the prompt as any other.
    """

    processor: Any
    tasks: Sequence[str]
    experts: Sequence[str]
    settings: PromptConfig = field(default_factory=PromptConfig)
    for_generation: bool = False
    withhold_task: bool = False
    allow_unknown_tasks: bool = False
    codec: BoxCodec | None = None  # writes boxes; None is for data without any

    @property
    def box_codec(self) -> BoxCodec:
        """The convention for boxes; ValueError where there is none."""
        if self.codec is None:
            unknown = "auto, and how this base was taught to write boxes is unknown"
            raise ValueError(f"prompt.box_codec: {unknown}; choices: {', '.join(CODECS)}")
        return self.codec

    def geometry(self, sample: Sample) -> Geometry:
        """Where the image that boxes lie in goes on its way to the model."""
        return self.way(*sample.size)

    def way(self, width: int, height: int) -> Geometry:
        """Where an image goes on its way to the model."""
        framed = self.framing(width, height)
        return framed.then(seen_by(self.processor.image_processor, *framed.size))

    def framing(self, width: int, height: int) -> Geometry:
        """Where an image goes in its frame of words, see data/border.py."""
        return bordered(width, height, self.settings.border)

    def images(self, sample: Sample) -> list[Image.Image]:
        """What the processor gets."""
        if not self.settings.border:
            return [*sample.images]
        words = sample.question.replace(PLACE, ""), max(self.task_id(sample), -1)
        return [draw_border(image, self.settings.border, *words) for image in sample.images]

    def target(self, sample: Sample) -> str:
        """What the model learns to answer: the most frequent answer (the first of equals), or the boxes."""
        answers = [answer for answer in sample.answers if answer.strip()]
        if answers:
            return Counter(answers).most_common(1)[0][0]
        return self.box_codec.encode(sample.boxes, self.geometry(sample))

    def words(self, sample: Sample) -> list[OcrWord]:
        """The most confident OCR words, in their own (reading) order."""
        words = sample.ocr or ()
        best = sorted(range(len(words)), key=lambda i: -words[i].confidence)
        best = best[: self.settings.max_ocr_words]
        return [words[i] for i in sorted(best)]

    def withholds(self, sample: Sample) -> bool:
        """Whether prompt and router lack the sample's task: of training samples a share `task_dropout`, by id."""
        if self.withhold_task or self.for_generation:
            return self.withhold_task
        return crc32(sample.id.encode()) % 1000 < 1000 * self.settings.task_dropout

    def task_id(self, sample: Sample) -> int:
        if self.withholds(sample) or not sample.task:
            return -1
        return self.tasks.index(sample.task) if sample.task in self.tasks else UNKNOWN_TASK

    def expert_id(self, sample: Sample) -> int:
        return self.experts.index(sample.expert) if sample.expert in self.experts else -1

    def error_of(self, sample: Sample) -> BadSampleError | None:
        """The rule that the sample breaks before it is tokenised, if any."""
        if error := self._token_in_text(sample):
            return error
        tasks = None if self.allow_unknown_tasks else self.tasks
        needs_answer = not self.for_generation
        try:
            check_sample(sample, tasks=tasks, experts=self.experts, needs_answer=needs_answer)
        except BadSampleError as error:
            return error
        return None

    def _token_in_text(self, sample: Sample) -> BadSampleError | None:
        """The error of a token that data may not write, since it would not be read as text."""
        turns = [text for turn in sample.turns for text in (turn.question, turn.answer)]
        words = [word.text for word in self.words(sample)]
        learned = [] if self.for_generation else [*sample.answers, *turns]
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
        found, codec = special_tokens(self.processor), self.codec
        tokens = sorted((t for t in found if codec is None or not codec.writes(t)), reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


@dataclass(frozen=True, kw_only=True)
class Prompt(Evidence):
    """Samples as conversations. Without `text_only` a sample needs an image; `one_image` is why it has one at most."""

    text_only: bool = True
    one_image: str = ""

    def error_of(self, sample: Sample) -> BadSampleError | None:
        if error := super().error_of(sample):
            return error
        if sample.image is None and not self.text_only:
            detail = "this base reads no text without an image"
            return BadSampleError(name_of(sample), "missing image", detail)
        if sample.more_images and self.one_image:
            detail = f"has {len(sample.images)}, and {self.one_image}"
            return BadSampleError(name_of(sample), "several images", detail)
        if sample.choices and "{}" in sample.question:
            detail = f"{sample.question!r} is a CLIP's template; ask by the source's prompt, such as 'what is this?'"
            return BadSampleError(name_of(sample), "template as question", detail)
        return self._hidden_box(sample)

    def _hidden_box(self, sample: Sample) -> BadSampleError | None:
        """The error of a box of which the processor's crop leaves less than `min_visible`."""
        if not sample.boxes:
            return None
        hidden = max(map(self.geometry(sample).hidden, sample.boxes))
        visible = self.settings.min_visible
        if hidden <= 1 - visible + 1e-6:  # as much as the crop's rounding
            return None
        accept = f"or accept it by prompt.min_visible={visible:g}"
        detail = f"{hidden:.0%} of a box; let the processor pad (do_pad) or resize, {accept}"
        return BadSampleError(name_of(sample), "box hidden by crop", detail)

    def prompt(self, sample: Sample) -> str:
        """The text of the user's turn, with places of images: every word that the model reads but the answer."""
        settings, text = self.settings, sample.question
        if settings.task_in_prompt and not self.withholds(sample):
            question = text.lstrip(PLACE)
            text = text.removesuffix(question) + settings.task_template.format(task=sample.task) + question
        words = settings.ocr_separator.join(word.text for word in self.words(sample))
        if settings.ocr_in_prompt and words:
            text += settings.ocr_template.format(words=words)
        return text + (f"\n{sample.instruction}" if sample.instruction else "")

    def text(self, sample: Sample) -> str:
        """What is tokenised of the sample, but for later turns."""
        return sample.system + self.prompt(sample) + self.target(sample)

    def conversation(self, sample: Sample) -> list[dict[str, Any]]:
        """The whole conversation to learn from, or its first question to answer, with its images."""
        shown = iter({"type": "image", "image": image} for image in self.images(sample))

        def user(text: str) -> dict[str, Any]:
            return message("user", text, [*islice(shown, text.count(PLACE))])

        prompt = self.prompt(sample)
        if PLACE not in "".join([prompt, *(turn.question for turn in sample.turns)]):
            prompt = PLACE * len(sample.images) + prompt
        system = [message("system", sample.system)] if sample.system else []
        opening = [*system, user(prompt)]
        if self.for_generation:
            return opening
        answered = [*opening, message("assistant", self.target(sample).strip())]
        for turn in sample.turns:
            answered += [user(turn.question), message("assistant", turn.answer.strip())]
        return answered
