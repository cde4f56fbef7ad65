"""Phrases and where they are: RefCOCO, RefCOCO+, RefCOCOg, Flickr30k Entities, Visual Genome.

RefCOCO    refs(unc).p, a pickled list of {ref_id, ann_id, image_id, split, sentences: [{sent_id,
           sent}]}, and instances.json, COCO's {"images", "annotations": [{id, bbox: [x, y, w, h]}]}
Entities   Sentences/1000092795.txt: [/EN#1/people Two young guys] with [/EN#2/bodyparts ...] ...
           Annotations/1000092795.xml: size, and per object its names, and bndbox (from 1) or none
Genome     region_descriptions.json: [{id, regions: [{region_id, image_id, x, y, width, height, phrase}]}]
"""

import pickle
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.etree import ElementTree

from rich.progress import track

from data.config import SourceConfig
from data.readers.fields import box_of, box_of_xywh, field, name, text
from data.readers.record import Record, Records, asked
from data.readers.rows import JsonRows, Row, require_file, text_lines
from data.readers.table import FOUR, parses, reads
from data.sample import Box

KEPT = ("ref_id", "ann_id", "image_id", "split")  # of a reference; the rest is large and unused
ROUNDING = 1.0  # pixels by which these files' boxes may stick out of their images
PHRASE = re.compile(r"\[/EN#(?P<id>\d+)(?:/[^\s\]]+)+ (?P<text>[^\]]*)\]")


REGION = "Please provide the bounding box coordinate of the region this sentence describes: {question}"
REGIONS: dict[str, Any] = {"task": "grounding", "prompt": REGION}


class PlainUnpickler(pickle.Unpickler):
    """A pickle is a program: it may name any function of the machine and call it. Here every name is refused, so that
    only lists, tuples, dicts, texts, numbers, booleans and None can come out."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"names {module}.{name}; only plain containers are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("refers to an object outside; only plain containers are read")


def load_plain(path: Path) -> Any:
    """The value of a pickle file, of Python 2 too; ValueError for anything but plain containers."""
    with path.open("rb") as file:
        try:
            return PlainUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a broken pickle fails in any way; none of it has run
            raise ValueError(f"{path}: not a pickle of plain containers: {error}") from None


@reads("refcoco", needs=FOUR, **REGIONS)
def read_refcoco(source: SourceConfig) -> Records:
    assert source.path and source.annotations
    refs = load_plain(require_file(source.path))
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{source.path}: must be a list of references")
    splits = Counter(ref.get("split") for ref in refs)
    if source.split not in splits:
        raise ValueError(f"{source.path}: no split {source.split!r}; it has {dict(splits)}")
    chosen = [(i, ref) for i, ref in enumerate(refs) if ref.get("split") == source.split]
    rows = [row for i, ref in chosen for row in sentences_of(ref, f"{source.path}: [{i}]")]
    boxes = JsonRows(source.annotations, at="annotations", key="id")
    named = JsonRows(source.annotations, at="images", key="id")
    return Records(rows=rows, parse=partial(parse_refcoco, source, boxes, named))


def sentences_of(ref: dict[str, Any], where: str) -> list[Row]:
    """Each sentence about one box, with the reference that it belongs to."""
    kept = {key: ref[key] for key in KEPT if key in ref}
    values = ref.get("sentences")
    if not isinstance(values, list):
        return [Row((kept, None), where)]  # its error comes when it is read
    return [Row((kept, v), f"{where}.sentences[{i}]") for i, v in enumerate(values)]


def parse_refcoco(source: SourceConfig, boxes: JsonRows, named: JsonRows, row: Row) -> Record:
    """The image's name is that of instances.json: a reference's own carries the annotation."""
    ref, value = row.value
    image_id = name(ref, "image_id")
    image, box = named.one(image_id), field(boxes.one(name(ref, "ann_id")), "bbox", list)
    own: dict[str, Any] = {"id": name(value, "sent_id"), "image_id": image_id}
    own |= {"question": text(value, "sent"), "split": text(ref, "split")}
    own |= {"frame": (field(image, "width", int), field(image, "height", int))}
    boxes_of_it = (box_of_xywh(box),)
    return asked(source, row, text(image, "file_name"), boxes=boxes_of_it, slack=ROUNDING, **own)


class Phrase(NamedTuple):
    image: str
    sentence: int
    number: int
    text: str
    boxes: tuple[Box, ...]
    size: tuple[int, int]
    file: str


@reads("flickr30k_entities", may=("annotations",), **REGIONS)
def read_entities(source: SourceConfig) -> Records:
    """The phrases that have a box, of the images that `annotations` lists (or of all)."""
    assert source.path
    root = Path(source.path)
    listed = source.annotations and " ".join(text_lines(source.annotations)).split()
    files = (root / "Sentences").glob("*.txt")
    stems = listed or sorted(file.stem for file in files if not file.name.startswith("."))
    if not stems:
        raise ValueError(f"{root}: holds no Sentences/*.txt")
    bar = track(stems, description=root.name, disable=len(stems) < 2000, transient=True)
    found = [phrase for stem in bar for phrase in phrases_of(root, stem)]
    rows = [Row(phrase, f"{phrase.file}:{phrase.sentence + 1}") for phrase in found]
    return Records(rows=rows, parse=partial(parse_phrase, source))


def phrases_of(root: Path, stem: str) -> list[Phrase]:
    file = root / "Sentences" / f"{stem}.txt"
    boxes, size = entity_boxes(require_file(root / "Annotations" / f"{stem}.xml"))
    return [
        Phrase(stem, line, number, found["text"], boxes[found["id"]], size, str(file))
        for line, sentence in enumerate(text_lines(file))
        for number, found in enumerate(PHRASE.finditer(sentence))
        if found["id"] in boxes
    ]


def entity_boxes(file: Path) -> tuple[dict[str, tuple[Box, ...]], tuple[int, int]]:
    """Boxes by entity, and the image's size; pixels count from 1 there and from 0 here."""
    try:
        content = file.read_bytes()
        if b"<!DOCTYPE" in content:
            raise ValueError("declares a document type")
        root = ElementTree.fromstring(content)
        size = int(number_in(root, "size/width")), int(number_in(root, "size/height"))
        boxes: dict[str, tuple[Box, ...]] = {}
        for thing in root.iterfind("object[bndbox]"):
            x0, y0, x1, y1 = (number_in(thing, f"bndbox/{edge}") - 1 for edge in ("xmin", "ymin", "xmax", "ymax"))
            for entity in thing.iterfind("name"):
                key = entity.text or ""
                boxes[key] = (*boxes.get(key, ()), (x0, y0, x1, y1))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file}: not an annotation of Flickr30k Entities: {error}") from None
    return boxes, size


def number_in(element: ElementTree.Element, path: str) -> float:
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"lacks {path}")
    return float(found)


def parse_phrase(source: SourceConfig, row: Row) -> Record:
    phrase: Phrase = row.value
    number = f"{phrase.image}#{phrase.sentence}#{phrase.number}"
    own: dict[str, Any] = {"id": number, "image_id": phrase.image, "question": phrase.text}
    own |= {"boxes": tuple(box_of(box) for box in phrase.boxes), "frame": phrase.size}
    return asked(source, row, f"{phrase.image}.jpg", slack=ROUNDING, **own)


@parses("visual_genome", rows=partial(JsonRows, count=lambda row: len(row["regions"]), about="regions"), **REGIONS)
def parse_region(source: SourceConfig, row: Row) -> Record:
    region = field(row.value, "regions", list)[row.part]
    image_id = name(region, "image_id")
    x, y, width, height = (field(region, key, int) for key in ("x", "y", "width", "height"))
    files = [f"{folder}{image_id}.jpg" for folder in ("VG_100K/", "VG_100K_2/", "")]
    own: dict[str, Any] = {"id": name(region, "region_id"), "image_id": image_id}
    own |= {"question": text(region, "phrase"), "boxes": (box_of_xywh((x, y, width, height)),)}
    return asked(source, row, *files, slack=ROUNDING, **own)
