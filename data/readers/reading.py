"""Questions about text in images: TextVQA, DocVQA, ST-VQA, OCR-VQA, ChartQA, and their OCR words.

TextVQA   {"data": [{question_id, image_id, question, answers: [text] x 10, set_name}]}
Rosetta   {"data": [{image_id, ocr_info: [{word, bounding_box: {top_left_x, ..., width}}]}]}, in 0..1
DocVQA    {"data": [{questionId, image: "documents/x.png", question, answers, data_split}]}
its OCR   ocr_results/x.json: {"recognitionResults": [{width, height, lines: [{words: [...]}]}]}
ST-VQA    {"data": [{question_id, file_path, question, answers}]}
OCR-VQA   {book id: {imageURL, questions: [...], answers: [...], split: 1 | 2 | 3}}
ChartQA   [{imgname, query, label}]
"""

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data.config import SourceConfig
from data.images import coco_number
from data.readers.fields import box_of_xywh, field, name, tags_of, text, texts
from data.readers.record import Record, Records, asked
from data.readers.rows import JsonRows, Row, read_json
from data.readers.table import parses, reads
from data.sample import Box, OcrWord

OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}
LOW = 0.5  # confidence of a word that the engine of DocVQA marks as "Low"; it gives no numbers


@reads("textvqa", may=("ocr",), task="ocr_vqa")
def read_textvqa(source: SourceConfig) -> Records:
    assert source.path
    ocr = JsonRows(source.ocr, at="data", key="image_id") if source.ocr else None
    parse = partial(parse_textvqa, source, ocr)
    return Records(rows=JsonRows(source.path, at="data"), parse=parse)


def parse_textvqa(source: SourceConfig, ocr: JsonRows | None, row: Row) -> Record:
    image_id, answers = name(row.value, "image_id"), texts(row.value, "answers", missing=())
    more: dict[str, Any] = {"answers": answers, "split": text(row.value, "set_name")}
    words = None if ocr is None else rosetta_words(ocr.one(image_id))
    return asked(source, row, f"{image_id}.jpg", ocr=words, frame=(1.0, 1.0), **more)


def rosetta_words(row: Any) -> tuple[OcrWord, ...]:
    """Rosetta's words, boxes in shares of the image; it gives no confidence."""
    infos = field(row, "ocr_info", list)
    return tuple(OcrWord(text=text(i, "word"), box=rosetta_box(i), confidence=1.0) for i in infos)


def rosetta_box(info: Any) -> Box:
    corner = field(info, "bounding_box", dict)
    keys = ("top_left_x", "top_left_y", "width", "height")
    return box_of_xywh([float(field(corner, key, int, float)) for key in keys])


@reads("docvqa", may=("ocr",), task="ocr_vqa")
def read_docvqa(source: SourceConfig) -> Records:
    assert source.path
    if source.ocr and not Path(source.ocr).is_dir():
        raise ValueError(f"{source.ocr}: no such folder of OCR results")
    return Records(rows=JsonRows(source.path, at="data"), parse=partial(parse_docvqa, source))


def parse_docvqa(source: SourceConfig, row: Row) -> Record:
    value, image = row.value, text(row.value, "image")
    ocr, page = source.ocr, PurePosixPath(image)
    more: dict[str, Any] = {"id": name(value, "questionId"), "split": text(value, "data_split")}
    if ocr is not None:
        more["ocr"], more["frame"] = page_words(Path(ocr), page.stem)
    if value.get("question_types"):
        more["tags"] = texts(value, "question_types")
    answers = texts(value, "answers", missing=())
    return asked(source, row, image, page.name, image_id=image, answers=answers, **more)


def page_words(folder: Path, page: str) -> tuple[tuple[OcrWord, ...], tuple[float, float]]:
    """The words of a page in their lines' order, and the page's width and height there."""
    result = field(read_json(folder / f"{page}.json"), "recognitionResults", list)[0]
    size = tuple(float(field(result, key, int, float)) for key in ("width", "height"))
    lines = [field(line, "words", list) for line in field(result, "lines", list)]
    return tuple(page_word(word) for line in lines for word in line), (size[0], size[1])


def page_word(word: Any) -> OcrWord:
    said, box = text(word, "text"), bounds(field(word, "boundingBox", list))
    return OcrWord(text=said, box=box, confidence=LOW if word.get("confidence") == "Low" else 1.0)


def bounds(corners: list[float]) -> Box:
    """The upright box around four corners x, y, x, y, ..."""
    if len(corners) != 8:
        raise ValueError(f"'boundingBox' must be eight numbers, got {corners!r:.60}")
    xs, ys = [float(x) for x in corners[::2]], [float(y) for y in corners[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


@parses("stvqa", at="data", task="ocr_vqa")
def parse_stvqa(source: SourceConfig, row: Row) -> Record:
    value, path = row.value, text(row.value, "file_path")
    more: dict[str, Any] = {"image_id": coco_number(path), "tags": tags_of(value, "dataset")}
    more |= {"split": text(value, "set_name") if "set_name" in value else None}
    return asked(source, row, path, answers=texts(value, "answers", missing=()), **more)


@reads("ocrvqa", needs=("path", "images", "split"), task="ocr_vqa")
def read_ocrvqa(source: SourceConfig) -> Records:
    assert source.path and source.split
    if source.split not in OCRVQA_SPLITS:
        raise ValueError(f"no split {source.split!r}; choices: {', '.join(OCRVQA_SPLITS)}")
    count = partial(questions_of_book, split=OCRVQA_SPLITS[source.split])
    rows = JsonRows(source.path, count=count, about=f"ocrvqa {source.split}")
    return Records(rows=rows, parse=partial(parse_ocrvqa, source))


def questions_of_book(row: Any, split: int) -> int:
    return len(row["questions"]) if row["split"] == split else 0


def parse_ocrvqa(source: SourceConfig, row: Row) -> Record:
    """A book's questions and answers are two parallel lists."""
    questions, answers = texts(row.value, "questions"), texts(row.value, "answers")
    if len(questions) != len(answers):
        raise ValueError(f"has {len(questions)} questions and {len(answers)} answers")
    suffix = PurePosixPath(text(row.value, "imageURL")).suffix
    more: dict[str, Any] = {"id": f"{row.key}/{row.part}", "image_id": row.key}
    more |= {"question": questions[row.part], "answers": (answers[row.part],)}
    more |= {"split": source.split, "tags": tags_of(row.value, "genre")}
    return asked(source, row, f"{row.key}{suffix}", f"{row.key}.jpg", **more)


@parses("chartqa", task="ocr_vqa")
def parse_chartqa(source: SourceConfig, row: Row) -> Record:
    image = text(row.value, "imgname")
    more: dict[str, Any] = {"id": row.where.rpartition(": ")[2], "image_id": image}
    more |= {"question": text(row.value, "query"), "answers": (text(row.value, "label"),)}
    more |= {"tags": (Path(source.path or "").stem.rpartition("_")[2],)}  # human or augmented
    return asked(source, row, image, **more)
