"""Questions about images: VQAv2, OK-VQA, A-OKVQA, GQA, VizWiz, POPE, ScienceQA.

VQAv2, OK-VQA  {"data_subtype": "train2014", "questions": [{question_id, image_id, question}]}
               {"annotations": [{question_id, answers: [{answer, ...}] x 10, ...}]}
A-OKVQA        [{question_id, image_id, question, choices, correct_choice_idx, direct_answers}]
GQA            {question id: {imageId, question, answer, ...}}
VizWiz         [{image, question, answers: [{answer, answer_confidence}], answerable}]
POPE           one JSON object a line, in spite of its name: {question_id, image, text, label}
ScienceQA      problems.json {id: {question, choices, answer, hint, image}}, pid_splits.json
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from data.config import SourceConfig
from data.images import coco_number, find_image
from data.readers.fields import answers_of, field, name, tags_of, text, texts
from data.readers.index import member_of
from data.readers.record import Record, Records, asked
from data.readers.rows import JsonLines, JsonRows, Row, read_json
from data.readers.table import FOUR, parses, reads

LETTER = "Answer with the option's letter from the given choices directly."


@reads("vqav2", may=("annotations",))
@reads("okvqa", may=("annotations",))
def read_vqa(source: SourceConfig) -> Records:
    """Questions joined with their annotations; a test split has none."""
    assert source.path
    questions = JsonRows(source.path, at="questions")
    subset = member_of(questions.path, "data_subtype")
    answers = source.annotations
    found = JsonRows(answers, at="annotations", key="question_id") if answers else None
    parse = partial(parse_vqa, annotations=found, source=source, subset=subset)
    return Records(rows=questions, parse=parse)


def parse_vqa(row: Row, annotations: JsonRows | None, source: SourceConfig, subset: str) -> Record:
    more: dict[str, Any] = {"split": subset}
    if annotations is not None:
        annotation = annotations.one(name(row.value, "question_id"))
        chosen = annotation.get("multiple_choice_answer")
        # the order of answers decides nothing but ties, and those go to the chosen answer
        answers = sorted(answers_of(annotation, "answers"), key=lambda a: a != chosen)
        more |= {"answers": tuple(answers)}
        more |= {"tags": tags_of(annotation, "answer_type", "question_type")}
    return asked(source, row, *coco_names(name(row.value, "image_id"), subset), **more)


def coco_names(number: str, subset: str) -> tuple[str, ...]:
    """Where COCO's image may be, by its name of 2014 (the folder may hold the subsets) or of 2017."""
    subset = subset.replace("test-dev", "test")
    old, new = f"COCO_{subset}_{int(number):012d}.jpg", f"{int(number):012d}.jpg"
    return old, f"{subset}/{old}", new, f"{subset}/{new}"


@parses("aokvqa")
def parse_aokvqa(source: SourceConfig, row: Row) -> Record:
    number, split = name(row.value, "image_id"), text(row.value, "split")
    answers = texts(row.value, "direct_answers", missing=())
    return asked(source, row, *coco_names(number, f"{split}2017"), answers=answers, split=split)


@parses("aokvqa_choice", instruction=LETTER)
def parse_aokvqa_choice(source: SourceConfig, row: Row) -> Record:
    """The options are in the question, and the answer is a letter; the test split has none."""
    record, key = parse_aokvqa(source, row), "correct_choice_idx"
    question = f"{record.question}\n{lettered(texts(row.value, 'choices'))}"
    answers = (letter(row.value, key),) if key in row.value else ()
    return replace(record, question=question, answers=answers)


def lettered(choices: tuple[str, ...]) -> str:
    return "\n".join(f"{ascii_uppercase[i]}. {choice}" for i, choice in enumerate(choices))


def letter(row: dict, key: str) -> str:
    """The letter of the right one of `choices`, from its number."""
    number, count = field(row, key, int), len(texts(row, "choices"))
    if not 0 <= number < count:
        raise ValueError(f"{key!r} must be in 0..{count - 1}, one of the choices, got {number}")
    return ascii_uppercase[number]


@parses("gqa")
def parse_gqa(source: SourceConfig, row: Row) -> Record:
    image_id = name(row.value, "imageId")
    more: dict[str, Any] = {"id": row.key, "image_id": image_id}
    if "answer" in row.value:  # test splits have none
        more["answers"] = (text(row.value, "answer"),)
    more["tags"] = tags_of(row.value.get("types") or {}, "structural", "semantic")
    return asked(source, row, f"{image_id}.jpg", **more)


@parses("vizwiz")
def parse_vizwiz(source: SourceConfig, row: Row) -> Record:
    value, image = row.value, text(row.value, "image")
    kind: tuple[str, ...] = ()
    if "answerable" in value:  # not in the test split
        kind = ("answerable" if field(value, "answerable", int) else "unanswerable",)
    answers = answers_of(value, "answers") if "answers" in value else ()
    tags = (*kind, *tags_of(value, "answer_type"))
    return asked(source, row, image, id=image, image_id=image, answers=answers, tags=tags)


@parses("pope", rows=JsonLines)
def parse_pope(source: SourceConfig, row: Row) -> Record:
    image = text(row.value, "image")
    more: dict[str, Any] = {"image_id": coco_number(image), "question": text(row.value, "text")}
    more |= {"answers": (text(row.value, "label"),)}
    more |= {"tags": (Path(source.path or "").stem.removeprefix("coco_pope_"),)}
    return asked(source, row, image, **more)


@reads("scienceqa", needs=FOUR, instruction=LETTER)
def read_scienceqa(source: SourceConfig) -> Records:
    """The problems of one split, in the order of pid_splits.json; some have no image."""
    assert source.path and source.annotations
    problems = JsonRows(source.path)
    splits = read_json(source.annotations)
    if not isinstance(splits, dict) or not all(isinstance(ids, list) for ids in splits.values()):
        raise ValueError(f"{source.annotations}: must be an object of lists of ids by split")
    if source.split not in splits:
        raise ValueError(f"{source.annotations}: no split {source.split!r}; it has {[*splits]}")
    rows = [Row(None, f"{problems.path}: [{key!r:.60}]", key=key) for key in splits[source.split]]
    return Records(rows=rows, parse=partial(parse_scienceqa, source, problems))


def parse_scienceqa(source: SourceConfig, problems: JsonRows, row: Row) -> Record:
    value = problems.one(row.key)
    hint, split = text(value, "hint"), text(value, "split")
    question = f"{text(value, 'question')}\n{lettered(texts(value, 'choices'))}"
    image = field(value, "image", str, type(None))
    names = image and (f"{split}/{row.key}/{image}", f"{row.key}/{image}")
    own: dict[str, Any] = {"id": row.key, "image_id": row.key, "split": split}
    own |= {"question": f"Context: {hint}\n{question}" if hint else question}
    own |= {"tags": ("picture" if image else "text", *tags_of(value, "subject", "grade"))}
    found = find_image(source.images, *names) if names else None
    return Record(image=found, answers=(letter(value, "answer"),), **own)
