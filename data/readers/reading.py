"""Questions that want reading: TextVQA, DocVQA, ST-VQA, OCR-VQA, ChartQA, and their OCR words.

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

from data.images import coco_number, find_image
from data.readers.fields import field, name, tags_of, text, texts
from data.readers.record import Record, Records
from data.readers.rows import JsonRows, Row, read_json
from data.sample import Box, OcrWord
from moa.config import SourceConfig

OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}
LOW = 0.5  # confidence of a word that the engine of DocVQA marks as "Low"; it gives no numbers


def read_textvqa(source: SourceConfig) -> Records:
    assert source.path and source.images
    ocr = JsonRows(source.ocr, at="data", key="image_id") if source.ocr else None
    parse = partial(parse_textvqa, images=source.images, ocr=ocr)
    return Records(rows=JsonRows(source.path, at="data"), parse=parse)


def parse_textvqa(row: Row, images: str, ocr: JsonRows | None) -> Record:
    value, image_id = row.value, name(row.value, "image_id")
    return Record(
        id=name(value, "question_id"),
        image_id=image_id,
        image=find_image(images, f"{image_id}.jpg"),
        question=text(value, "question"),
        answers=texts(value, "answers") if "answers" in value else (),
        ocr=None if ocr is None else rosetta_words(ocr.one(image_id)),
        frame=(1.0, 1.0),
        split=text(value, "set_name"),
    )


def rosetta_words(row: Any) -> tuple[OcrWord, ...]:
    """Rosetta's words, boxes in shares of the image; it says nothing of its confidence."""
    return tuple(
        OcrWord(text=text(info, "word"), box=rosetta_box(info), confidence=1.0)
        for info in field(row, "ocr_info", list)
    )


def rosetta_box(info: Any) -> Box:
    corner = field(info, "bounding_box", dict)
    x, y, width, height = (
        float(field(corner, key, int, float))
        for key in ("top_left_x", "top_left_y", "width", "height")
    )
    return x, y, x + width, y + height


def read_docvqa(source: SourceConfig) -> Records:
    assert source.path and source.images
    if source.ocr and not Path(source.ocr).is_dir():
        raise ValueError(f"{source.ocr}: no such folder of OCR results")
    parse = partial(parse_docvqa, images=source.images, ocr=source.ocr)
    return Records(rows=JsonRows(source.path, at="data"), parse=parse)


def parse_docvqa(row: Row, images: str, ocr: str | None) -> Record:
    value, image = row.value, text(row.value, "image")
    words, frame = (None, None) if ocr is None else page_words(Path(ocr), PurePosixPath(image).stem)
    kinds = texts(value, "question_types") if value.get("question_types") else ()
    return Record(
        id=name(value, "questionId"),
        image_id=image,
        image=find_image(images, image, PurePosixPath(image).name),
        question=text(value, "question"),
        answers=texts(value, "answers") if "answers" in value else (),
        ocr=words,
        frame=frame,
        split=text(value, "data_split"),
        tags=kinds,
    )


def page_words(folder: Path, page: str) -> tuple[tuple[OcrWord, ...], tuple[float, float]]:
    """The words of a page in their lines' order, and the page's width and height there."""
    result = field(read_json(folder / f"{page}.json"), "recognitionResults", list)[0]
    size = tuple(float(field(result, key, int, float)) for key in ("width", "height"))
    words = [
        OcrWord(
            text=text(word, "text"),
            box=bounds(field(word, "boundingBox", list)),
            confidence=LOW if word.get("confidence") == "Low" else 1.0,
        )
        for line in field(result, "lines", list)
        for word in field(line, "words", list)
    ]
    return tuple(words), (size[0], size[1])


def bounds(corners: list[float]) -> Box:
    """The upright box around four corners x, y, x, y, ..."""
    if len(corners) != 8:
        raise ValueError(f"'boundingBox' must be eight numbers, got {corners!r:.60}")
    xs, ys = [float(x) for x in corners[::2]], [float(y) for y in corners[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def read_stvqa(source: SourceConfig) -> Records:
    assert source.path and source.images
    rows = JsonRows(source.path, at="data")
    return Records(rows=rows, parse=partial(parse_stvqa, images=source.images))


def parse_stvqa(row: Row, images: str) -> Record:
    value, path = row.value, text(row.value, "file_path")
    return Record(
        id=name(value, "question_id"),
        image_id=coco_number(path),
        image=find_image(images, path),
        question=text(value, "question"),
        answers=texts(value, "answers") if "answers" in value else (),
        split=text(value, "set_name") if "set_name" in value else None,
        tags=tags_of(value, "dataset"),
    )


def read_ocrvqa(source: SourceConfig) -> Records:
    assert source.path and source.images and source.split
    if source.split not in OCRVQA_SPLITS:
        raise ValueError(f"no split {source.split!r}; choices: {', '.join(OCRVQA_SPLITS)}")
    count = partial(questions_of_book, split=OCRVQA_SPLITS[source.split])
    rows = JsonRows(source.path, count=count, about=f"ocrvqa {source.split}")
    return Records(rows=rows, parse=partial(parse_ocrvqa, images=source.images, split=source.split))


def questions_of_book(row: Any, split: int) -> int:
    return len(row["questions"]) if row["split"] == split else 0


def parse_ocrvqa(row: Row, images: str, split: str) -> Record:
    """A book's questions and answers stand in two parallel lists."""
    questions, answers = texts(row.value, "questions"), texts(row.value, "answers")
    if len(questions) != len(answers):
        raise ValueError(f"has {len(questions)} questions and {len(answers)} answers")
    suffix = PurePosixPath(text(row.value, "imageURL")).suffix
    return Record(
        id=f"{row.key}/{row.part}",
        image_id=row.key,
        image=find_image(images, f"{row.key}{suffix}", f"{row.key}.jpg"),
        question=questions[row.part],
        answers=(answers[row.part],),
        split=split,
        tags=tags_of(row.value, "genre"),
    )


def read_chartqa(source: SourceConfig) -> Records:
    assert source.path and source.images
    kind = Path(source.path).stem.rpartition("_")[2]  # human or augmented
    parse = partial(parse_chartqa, images=source.images, kind=kind)
    return Records(rows=JsonRows(source.path), parse=parse)


def parse_chartqa(row: Row, images: str, kind: str) -> Record:
    image = text(row.value, "imgname")
    return Record(
        id=row.where.rpartition(": ")[2],
        image_id=image,
        image=find_image(images, image),
        question=text(row.value, "query"),
        answers=(text(row.value, "label"),),
        tags=(kind,),
    )
