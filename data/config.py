"""Settings of data sets, of their mixture and of the prompt that a model reads; parts of a run's config."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Literal

from data.readers.names import readers
from moa.cli.ranges import (
    Count,
    CountOrZero,
    FilePath,
    Positive,
    Processes,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Size,
)
from moa.cli.settings import Wrong, check

MADE = ("scenes", "drawings")  # formats without files, of as many samples as one asks for
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[(*MADE, *readers())]


def is_file_name(name: str) -> bool:
    """Whether files can be called so in the folder that they are written to, and nowhere else."""
    plain = re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff/\\.][^\x00-\x1f\x7f\ud800-\udfff/\\]*", name)
    return plain is not None and len(name.encode()) <= 150


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    name: str = "source"  # in logs and tables: its key, where sources have keys
    format: Format = "scenes"  # how its files are written; docs/data.md
    path: FilePath | None = None  # file of the questions, captions or rows; or a folder
    images: FilePath | None = None  # folder that the images' names are relative to
    annotations: FilePath | None = None  # second file, where answers, boxes or splits lie apart
    ocr: FilePath | None = None  # the data set's own OCR words: file of textvqa, folder of docvqa
    columns: dict[str, str] | None = None  # of format table: field of a sample -> column
    # of scenes and drawings, or where one file holds several; a+b joins two
    split: str | None = None
    one_per: Literal["image", "caption"] = "image"  # of captions: to score by all, or to learn each
    task: str | None = None  # null: the format's own, or each row's
    # around {question}; of images to classify: "a photo of a {}"; null: the format's own
    prompt: str | None = None
    instruction: str | None = None  # behind question and OCR words; null: the format's own
    style: str | None = None  # of scenes and drawings: drawing style; null: the split's own
    asks: str | None = None  # of scenes: the task whose questions they are, where `task` is another name
    # of scenes: answers by another convention, see data/world/questions.py
    convention: str | None = None
    sign: str | None = None  # of scenes: only those whose sign has a word, or scribble; null: all
    # the expert that these samples train; null: the reader's own choice; none: to be left to the base
    expert: str | None = None
    # what scores them: docs/evaluation.md; null: the format's own, or their task's
    benchmark: str | None = None
    # size of scenes and drawings; elsewhere only the first ones
    num_samples: Count | None = None
    seed: Seed = 0  # of scenes and drawings
    ocr_cache: FilePath | None = None  # Parquet file of OCR words; null: data.ocr_cache
    # how much of the training mixture it is: at most one of the three; null everywhere: weight 1
    weight: Positive | None = None  # share of the draws, relative to the other sources
    count: Count | None = None  # draws per epoch, whatever the source's size
    epochs: Positive | None = None  # passes over the source per epoch

    @property
    def counts_draws(self) -> bool:
        return self.count is not None or self.epochs is not None

    def __post_init__(self) -> None:
        rule = "must be a file's name: no / \\ or control character, no dot first, 1 to 150 bytes"
        check(is_file_name(self.name), "name", f"{rule}; got {self.name!r}")
        shares = {"weight": self.weight, "count": self.count, "epochs": self.epochs}
        given = {name: value for name, value in shares.items() if value is not None}
        check(len(given) <= 1, "", f"has {' and '.join(given)}; choose one")
        form, made = self.format, self.format in MADE
        check(not made or self.num_samples is not None, "num_samples", f"{form} needs a number")
        check(not made or self.path is None, "path", f"has no effect with format={form}")
        check(made or self.path is not None, "path", f"format {form} needs a file")
        for key in ("asks", "convention", "sign"):
            check(form == "scenes" or getattr(self, key) is None, key, f"has no effect with format={form}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # the training mixture, by name
    # scored by loss during training, by name
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    # tasks known to the router, in the order of their ids
    tasks: list[str] = field(default_factory=lambda: ["vqa", "caption", "grounding", "ocr_vqa"])
    expert: str | None = None  # overrides every source's expert: the baseline with a single adapter
    ocr_cache: FilePath | None = None  # Parquet file of OCR words; null: no OCR evidence
    ocr_min_confidence: Share = 0.5  # of the engine: lines that it is less sure of are dropped
    ocr_engine: bool = False  # images that the cache lacks are read by the engine, live
    on_bad_sample: Literal["error", "skip"] = "error"  # stop, or count, leave out and report
    group_by_length: bool = False  # batches of samples of like length, text alone by itself
    group_window: Size = 50  # batches that are sorted together; more: less padding, less random
    # processes that load and collate; the order is the same for any number
    num_workers: Processes = 0

    def __post_init__(self) -> None:
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        check(not twice, "tasks", f"names {', '.join(twice)} twice; each has one id")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    task_in_prompt: bool = True  # the language model reads the task's name
    ocr_in_prompt: bool = True  # the language model reads the OCR words as reference tokens
    task_dropout: Share = 0.0  # share of training samples whose task is withheld from both
    task_template: str = "[{task}] "  # stands before the question
    ocr_template: str = "\nReference OCR token: {words}"  # stands after the question
    # how boxes are written as text; auto: as the base was taught, by its vocabulary and family
    box_codec: Literal[
        "auto", "location_tokens", "paligemma", "llava", "shikra", "qwen_vl", "qwen2_vl", "qwen2_5_vl",
        "qwen3_vl", "internvl",
    ] = "auto"  # fmt: skip
    # the least share of a box that the processor's crop must leave; a box with less is a bad sample
    min_visible: ShareAboveZero = 1.0
    # width of a frame around each image, as a share of its longer side, in which the task's number and the question's
    # words are drawn, for the router and the model alike; 0: none
    border: ShareBelowOne = 0.0
    max_length: Count = 2048  # tokens of prompt and answer; a longer sample is a bad sample
    ocr_separator: str = " "  # between the words; LLaVA's own prompts have a comma and a blank
    max_ocr_words: CountOrZero = 64  # the most confident ones are kept, for prompt and router

    def __post_init__(self) -> None:
        check_template("task_template", self.task_template, "task")
        check_template("ocr_template", self.ocr_template, "words")


def check_shares(sources: Iterable[SourceConfig]) -> None:
    """Draws say how long an epoch is, weights do not: a mixture has one or the other."""
    counted = [s.name for s in sources if s.counts_draws]
    rest = [s.name for s in sources if not s.counts_draws]
    rule = f"count or epochs of {', '.join(counted)} need count or epochs here too"
    check(not (counted and rest), f"data.sources.{', '.join(rest)}", rule)


def check_template(key: str, template: str, place: str) -> None:
    """Wrong for a template with another place than {place}, or with one that has a format."""
    rule = f"may have {{{place}}} as its only place, and {{{{ }}}} for braces; got {template!r}"
    try:
        places = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise Wrong(key, f"{rule} ({error})") from None
    check(all(found == (place, "", None) for found in places), key, rule)
