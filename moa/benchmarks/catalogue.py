"""Every benchmark for models that generate, by the name that a config gives it.

`TASKS` are for data of one's own: where neither source nor format says more, a sample is scored by the
one of its task, or by exact match where its task has another name. The others are published ones.
"""

from collections.abc import Iterable, Sequence

from moa.benchmarks.benchmark import Benchmark
from moa.benchmarks.captioning import CAPTION, COCO_CAPTIONS
from moa.benchmarks.gqa import GQA
from moa.benchmarks.grounding import GROUNDING
from moa.benchmarks.pope import POPE
from moa.benchmarks.scienceqa import SCIENCEQA
from moa.benchmarks.short_answers import (
    AOKVQA,
    CHARTQA,
    DOCVQA,
    EXACT,
    OCR_VQA,
    STVQA,
    TEXTVQA,
    VIZWIZ,
    VQA,
    VQAV2,
)  # fmt: skip
from moa.config import SourceConfig

TASKS = ("vqa", "caption", "grounding", "ocr_vqa", "count", "yes_no")
BENCHMARKS: dict[str, Benchmark] = {
    "vqa": VQA,
    "caption": CAPTION,
    "grounding": GROUNDING,
    "ocr_vqa": OCR_VQA,
    "count": EXACT,
    "yes_no": EXACT,
    "vqav2": VQAV2,
    "okvqa": VQAV2,
    "aokvqa": AOKVQA,
    "aokvqa_choice": SCIENCEQA,
    "textvqa": TEXTVQA,
    "vizwiz": VIZWIZ,
    "docvqa": DOCVQA,
    "stvqa": STVQA,
    "chartqa": CHARTQA,
    "gqa": GQA,
    "scienceqa": SCIENCEQA,
    "pope": POPE,
    "refcoco": GROUNDING,
    "coco_captions": COCO_CAPTIONS,
}

# what scores a format by itself; the other formats hold tasks of any kind
BY_FORMAT: dict[str, str] = {
    **{name: name for name in BENCHMARKS if name not in TASKS},
    "karpathy": "coco_captions",
    "flickr30k": "coco_captions",
    "flickr30k_entities": "refcoco",
    "ocrvqa": "ocr_vqa",
}


def benchmark_called(name: str) -> Benchmark:
    """The benchmark of this name; for a task of one's own that is called otherwise, exact match."""
    return BENCHMARKS.get(name, EXACT)


def benchmark_of(source: SourceConfig) -> str | None:
    """The benchmark that a source names, or its format's; None: each sample's task decides."""
    return source.benchmark or BY_FORMAT.get(source.format)


def check_sources(sources: Iterable[SourceConfig], only: Sequence[str] = ()) -> None:
    """ValueError for names that the files of results cannot have, and for an unknown benchmark."""
    sources = [*sources]
    names = [source.name for source in sources]
    folded = [name.casefold() for name in names]
    for name in names:
        if name.casefold() == "routing":
            raise ValueError(
                f"sources: {name!r} is the name of the file with the gates; use another"
            )
        if folded.count(name.casefold()) > 1:
            raise ValueError(f"sources: two data sets have the name {name} (but for upper case)")
    for source in sources:
        if source.benchmark is not None and source.benchmark not in BENCHMARKS:
            choices = f"no benchmark {source.benchmark!r}; choices: {', '.join(BENCHMARKS)}"
            raise ValueError(f"sources.{source.name}.benchmark: {choices}")
    for name in only:
        if name not in names:
            raise ValueError(f"only: no data set {name!r}; choices: {', '.join(names)}")
