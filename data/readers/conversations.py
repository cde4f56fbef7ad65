"""Conversations about a picture: LLaVA's JSON, and messages as LLaMA-Factory, ms-swift, TRL have them.

    {"id", "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nQ"},
                                                              {"from": "gpt", "value": "A"}, ...]}
    {"images": ["1.jpg"], "messages": [{"role": "user", "content": "<image>Q"},
                                       {"role": "assistant", "content": "A"}, ...]}

A file is a JSON list (scanned, never held whole), one object a line, or Parquet. The picture is put
before the first question, wherever `<image>` stood in it; rows without a picture are text alone.
"""

from functools import partial
from typing import Any

from data.pictures import Picture, coco_number, named_picture
from data.readers.fields import field, name, text
from data.readers.record import Record, Records
from data.readers.rows import Row, Rows, json_rows
from data.readers.tables import TableRows, open_table, picture_of
from data.sample import Turn
from moa.config import SourceConfig

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
PLACE = "<image>"
UNREAD = ("<bbox>", "<ref-object>", "<video>", "<audio>")  # placeholders of what is not read here


def read_conversations(source: SourceConfig) -> Records:
    assert source.path
    parse = partial(parse_conversation, images=source.images)
    return Records(rows=conversation_rows(source.path), parse=parse)


def conversation_rows(path: str) -> Rows:
    return TableRows(open_table(path), path) if path.endswith(".parquet") else json_rows(path)


def parse_conversation(row: Row, images: str | None) -> Record:
    system, turns = turns_of(row.value)
    pictures = pictures_of(row.value)
    check_places(turns, len(pictures))
    (question, answer), *later = [(clean(q), a) for q, a in turns]
    if any(a is None for _, a in later):
        raise ValueError("ends with a question that nobody answers")
    image = pictures[0] if pictures else None
    return Record(
        id=name(row.value, "id") if "id" in row.value else row.where.rpartition("/")[2],
        image_id=coco_number(image) if isinstance(image, str) else row.where,
        picture=None if image is None else to_picture(image, images),
        question=question,
        answers=() if answer is None else (answer,),
        system=system,
        turns=tuple(Turn(question=q, answer=a or "") for q, a in later),
    )


def turns_of(row: Any) -> tuple[str, list[tuple[str, str | None]]]:
    """The system prompt, and questions with their answers (None for a last one without)."""
    system = ""
    turns: list[tuple[str, str | None]] = []
    for role, words in messages_of(row):
        if role == "system" and not turns:
            system = words
        elif role not in ROLES:
            raise ValueError(f"unknown role {role!r}; choices: system, {', '.join(ROLES)}")
        elif ROLES[role] == "user":
            if turns and turns[-1][1] is None:
                raise ValueError("has two questions in a row")
            turns.append((words, None))
        elif turns:  # a conversation may begin with a cut-off answer, which LLaVA drops too
            if turns[-1][1] is not None:
                raise ValueError("has two answers in a row")
            turns[-1] = turns[-1][0], words
    if not turns:
        raise ValueError("has no question")
    return system, turns


def messages_of(row: Any) -> list[tuple[str, str]]:
    """Role and words of each message, in either spelling."""
    if isinstance(row, dict) and "conversations" in row:
        found = field(row, "conversations", list)
        return [(text(message, "from"), text(message, "value")) for message in found]
    found = field(row, "messages", list)
    return [(text(message, "role"), words_of(message)) for message in found]


def words_of(message: Any) -> str:
    """The content of a message: text, or a list of {"type": "text" | "image"} parts."""
    content = field(message, "content", str, list)
    if isinstance(content, str):
        return content
    kinds = {"image": lambda part: PLACE, "text": lambda part: text(part, "text")}
    for part in content:
        if text(part, "type") not in kinds:
            raise ValueError(f"unknown part {part['type']!r}; choices: {', '.join(kinds)}")
    return "".join(kinds[part["type"]](part) for part in content)


def pictures_of(row: dict[str, Any]) -> list[Any]:
    """What `image` or `images` names: one, a list, or nothing."""
    found = row.get("images", row.get("image"))
    return [] if found is None else found if isinstance(found, list) else [found]


def to_picture(image: Any, images: str | None) -> Picture:
    if isinstance(image, str):
        return named_picture(image, images)
    picture = picture_of(image)
    assert picture is not None  # the row names one
    return picture


def check_places(turns: list[tuple[str, str | None]], num_pictures: int) -> None:
    """The number of places for pictures must be that of pictures, and one at the most."""
    words = [part for turn in turns for part in turn if part is not None]
    places = sum(part.count(PLACE) for part in words)
    if places != num_pictures:
        raise ValueError(f"has {places} times {PLACE} for {num_pictures} pictures")
    if num_pictures > 1:
        raise ValueError(f"has {num_pictures} pictures; a sample has one at the most")
    if places and PLACE not in turns[0][0]:
        raise ValueError(f"has its {PLACE} behind the first question")
    for mark in UNREAD:
        if any(mark in part for part in words):
            raise ValueError(f"has {mark}, which is not read from this format")


def clean(question: str) -> str:
    return question.replace(PLACE, "").strip()
