"""Images with several captions: COCO, the Karpathy splits, Flickr30k.

    COCO      {"images": [{id, file_name}], "annotations": [{id, image_id, caption}]}
    Karpathy  {"images": [{filepath, filename, cocoid, split, sentences: [{raw, sentid}]}]}
    Flickr    1000092795.jpg#0<TAB>caption, or Kaggle's image_name| comment_number| comment

`one_per: image` makes one sample of an image with all its captions (to score), `one_per: caption`
one of every caption (to learn from).
"""

import re
from collections import Counter
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from data.config import SourceConfig
from data.images import find_image
from data.readers.fields import field, name, text
from data.readers.record import Record, Records
from data.readers.rows import JsonRows, Row, text_lines
from data.readers.table import reads

TOKEN_LINE = re.compile(r"(?P<image>[^#\t]+)#(?P<number>\d+)\t(?P<caption>.*)")
# one row of Kaggle's file lacks its second bar: `2199200615.jpg| 4   A dog runs across the grass .`
CSV_LINE = re.compile(r"(?P<image>[^|]+?)\s*\|\s*(?P<number>\d+)(?:\s*\|\s*|\s+)(?P<caption>.*)")


CAPTION = "Provide a one-sentence caption for the provided image."
CAPTIONS: dict[str, Any] = {"task": "caption", "prompt": CAPTION}


@reads("coco_captions", may=("one_per",), **CAPTIONS)
def read_coco(source: SourceConfig) -> Records:
    assert source.path
    named = JsonRows(source.path, at="images", key="id")
    if source.one_per == "caption":
        rows = JsonRows(source.path, at="annotations")
        return Records(rows=rows, parse=partial(parse_coco_caption, named, source.images))
    captions = JsonRows(source.path, at="annotations", key="image_id")
    return Records(rows=named, parse=partial(parse_coco_image, captions, source.images))


def parse_coco_image(captions: JsonRows, images: str | None, row: Row) -> Record:
    number = name(row.value, "id")
    image = find_image(images, text(row.value, "file_name"))
    answers = tuple(text(caption.value, "caption") for caption in captions.all(number))
    return Record(id=number, image_id=number, image=image, answers=answers)


def parse_coco_caption(named: JsonRows, images: str | None, row: Row) -> Record:
    image_id, answers = name(row.value, "image_id"), (text(row.value, "caption"),)
    image = find_image(images, text(named.one(image_id), "file_name"))
    return Record(id=name(row.value, "id"), image_id=image_id, image=image, answers=answers)


@reads("karpathy", needs=("path", "images", "split"), may=("one_per",), **CAPTIONS)
def read_karpathy(source: SourceConfig) -> Records:
    """`split` may name several: COCO's training set is train+restval."""
    assert source.path and source.split
    wanted = source.split.split("+")
    count = partial(captions_of_image, splits=wanted, single=source.one_per == "caption")
    about = f"karpathy {source.split} {source.one_per}"
    rows = JsonRows(source.path, at="images", key="split", count=count, about=about)
    found = Counter(key.decode() for key in rows.keys)
    for split in wanted:
        if split not in found:
            raise ValueError(f"{rows.path}: no split {split!r}; it has {dict(found)}")
    return Records(rows=rows, parse=partial(parse_karpathy, source))


def captions_of_image(row: Any, splits: list[str], single: bool) -> int:
    return (len(row["sentences"]) if single else 1) if row["split"] in splits else 0


def parse_karpathy(source: SourceConfig, row: Row) -> Record:
    single = source.one_per == "caption"
    value, file = row.value, text(row.value, "filename")
    image_id = name(value, "cocoid") if "cocoid" in value else PurePosixPath(file).stem
    sentences = field(value, "sentences", list)
    folder = text(value, "filepath") if "filepath" in value else "."  # Flickr's file has none
    chosen = sentences[row.part : row.part + 1] if single else sentences
    image = find_image(source.images, f"{folder}/{file}", file)
    answers = tuple(text(sentence, "raw") for sentence in chosen)
    number, split = name(chosen[0], "sentid") if single else image_id, text(value, "split")
    return Record(id=number, image_id=image_id, image=image, answers=answers, split=split)


@reads("flickr30k", may=("one_per",), **CAPTIONS)
def read_flickr30k(source: SourceConfig) -> Records:
    """The token file or Kaggle's CSV, whole: 32 thousand images are 20 MB of text."""
    assert source.path
    by_image: dict[str, list[tuple[str, str, str]]] = {}
    for number, line in enumerate(text_lines(source.path), start=1):
        if not line.strip() or line.startswith("image_name|"):
            continue
        found = TOKEN_LINE.fullmatch(line) or CSV_LINE.fullmatch(line)
        where = f"{source.path}:{number}"
        if found is None:
            forms = "IMAGE.jpg#NUMBER<TAB>CAPTION nor IMAGE.jpg| NUMBER| CAPTION"
            raise ValueError(f"{where}: neither {forms}: {line!r:.60}")
        caption = found["number"], found["caption"].strip(), where
        by_image.setdefault(found["image"].strip(), []).append(caption)
    items: list[Any] = [(image, captions) for image, captions in by_image.items()]
    if source.one_per == "caption":
        items = [(image, [caption]) for image, captions in items for caption in captions]
    rows = [Row(item, item[1][0][2]) for item in items]
    return Records(rows=rows, parse=partial(parse_flickr, source))


def parse_flickr(source: SourceConfig, row: Row) -> Record:
    file, captions = row.value
    stem, answers = PurePosixPath(file).stem, tuple(caption for _, caption, _ in captions)
    number = f"{stem}#{captions[0][0]}" if source.one_per == "caption" else stem
    image = find_image(source.images, file)
    return Record(id=number, image_id=stem, image=image, answers=answers)
