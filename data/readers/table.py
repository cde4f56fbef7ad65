"""The formats that can be read: add a reader here, and its name to `Format` in moa/config.py.

A reader is a function from a source's config to `Records`; the row says which keys of the config it
needs and may use, so that a forgotten file or a setting without effect is one clear error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from data.checks import one_line
from data.ocr import OcrSource
from data.readers import captions, conversations, folders, grounding, own, reading, tables, vqa
from data.readers.record import RecordDataset, Records
from moa.config import SourceConfig

CAPTION = "Provide a one-sentence caption for the provided image."
REGION = (
    "Please provide the bounding box coordinate of the region this sentence describes: {question}"
)
CLASS = "a photo of a {}"
LETTER = "Answer with the option's letter from the given choices directly."
SOME_USE = ("path", "images", "annotations", "ocr", "columns", "one_per", "style", "seed")
DEFAULTS = {field.name: field.default for field in fields(SourceConfig)}


@dataclass(frozen=True, kw_only=True)
class Format:
    """A reader, the config keys that it needs and may use, and what its samples are by default."""

    read: Callable[[SourceConfig], Records]
    needs: tuple[str, ...] = ("path", "images")
    may: tuple[str, ...] = ()
    task: str = "vqa"
    prompt: str = "{question}"
    instruction: str = ""


reads = partial(Format, task="ocr_vqa")
captioned = partial(Format, task="caption", prompt=CAPTION, may=("one_per",))
grounded = partial(Format, task="grounding", prompt=REGION)
FILE, FOUR = ("path",), ("path", "annotations", "images", "split")
FORMATS = {
    "jsonl": Format(read=own.read_jsonl, needs=FILE, may=("images",)),
    "llava": Format(read=conversations.read_conversations, needs=FILE, may=("images",)),
    "messages": Format(read=conversations.read_conversations, needs=FILE, may=("images",)),
    "table": Format(read=tables.read_table, needs=FILE, may=("images", "columns")),
    "vqav2": Format(read=vqa.read_vqa, may=("annotations",)),
    "okvqa": Format(read=vqa.read_vqa, may=("annotations",)),
    "aokvqa": Format(read=partial(vqa.read_aokvqa, choose=False)),
    "aokvqa_choice": Format(read=partial(vqa.read_aokvqa, choose=True), instruction=LETTER),
    "gqa": Format(read=vqa.read_gqa),
    "vizwiz": Format(read=vqa.read_vizwiz),
    "pope": Format(read=vqa.read_pope),
    "scienceqa": Format(read=vqa.read_scienceqa, needs=FOUR, instruction=LETTER),
    "textvqa": reads(read=reading.read_textvqa, may=("ocr",)),
    "docvqa": reads(read=reading.read_docvqa, may=("ocr",)),
    "stvqa": reads(read=reading.read_stvqa),
    "ocrvqa": reads(read=reading.read_ocrvqa, needs=("path", "images", "split")),
    "chartqa": reads(read=reading.read_chartqa),
    "coco_captions": captioned(read=captions.read_coco),
    "karpathy": captioned(read=captions.read_karpathy, needs=("path", "images", "split")),
    "flickr30k": captioned(read=captions.read_flickr30k),
    "webdataset": captioned(read=folders.read_webdataset, needs=FILE, may=()),
    "refcoco": grounded(read=grounding.read_refcoco, needs=FOUR),
    "flickr30k_entities": grounded(read=grounding.read_entities, may=("annotations",)),
    "visual_genome": grounded(read=grounding.read_visual_genome),
    "image_folder": Format(
        read=folders.read_image_folder, needs=FILE, task="classification", prompt=CLASS
    ),
}


def open_records(
    source: SourceConfig,
    expert: str | None,
    ocr: OcrSource | None = None,
) -> RecordDataset:
    """The data set of a source; ValueError, naming its key, for files that are missing or not as said."""
    chosen = FORMATS[source.format]
    check_keys(source, chosen)
    prompt = chosen.prompt if source.prompt is None else source.prompt
    check_prompt(source.name, prompt)
    try:
        records = chosen.read(source)
    except ValueError as error:
        said = f"data.sources.{source.name}: format {source.format}: {error}"
        raise ValueError(one_line(said)) from None
    if len(records) == 0:
        raise ValueError(f"data.sources.{source.name}: {source.path} holds no rows")
    return RecordDataset(
        records=records,
        source=source.name,
        default_task=chosen.task,
        task=source.task,
        expert=expert,
        split=source.split,
        prompt=prompt,
        instruction=chosen.instruction if source.instruction is None else source.instruction,
        num_samples=source.num_samples,
        ocr=ocr,
    )


def check_keys(source: SourceConfig, chosen: Format) -> None:
    """ValueError for a key that the format needs and lacks, or that has no effect on it."""
    key, takes = f"data.sources.{source.name}", (*chosen.needs, *chosen.may)
    for name in chosen.needs:
        if getattr(source, name) is None:
            raise ValueError(f"{key}.{name}: format {source.format} needs it: {', '.join(takes)}")
    for name in SOME_USE:
        if name not in takes and getattr(source, name) != DEFAULTS[name]:
            raise ValueError(f"{key}.{name}: has no effect with format={source.format}")
    if source.images is not None and not Path(source.images).is_dir():
        raise ValueError(f"{key}.images: no such folder: {source.images}")


def check_prompt(name: str, prompt: str) -> None:
    """A `{}` is the class name's place in CLIP's templates, and left alone."""
    unknown = [place for place in re.findall(r"\{\w+\}", prompt) if place != "{question}"]
    if unknown:
        raise ValueError(
            f"data.sources.{name}.prompt: {unknown[0]} in {prompt!r} is not {{question}}"
        )
