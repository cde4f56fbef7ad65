"""Conversations about an image: LLaVA's JSON, and messages as LLaMA-Factory, ms-swift, TRL have them.

    {"id", "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nQ"},
                                                              {"from": "gpt", "value": "A"}, ...]}
    {"images": ["1.jpg"], "messages": [{"role": "user", "content": "<image>Q"},
                                       {"role": "assistant", "content": "A"}, ...]}

A file is a JSON list (scanned, never held whole), one object a line, or Parquet. Images stand where their `<image>` is,
in any question; the only one of a row is put before the first question, wherever it stood in it. Rows without an image
are text alone.
`system` may stand beside the conversation. A key of CHANGES that holds something is refused; any other key is left out.
"""

import re
from functools import partial
from typing import Any

from data.config import SourceConfig
from data.images import coco_number
from data.readers.fields import field, name, text
from data.readers.record import Record, Records
from data.readers.rows import Row, json_rows
from data.readers.table import FILE, reads
from data.readers.tables import TableRows, fields_of, image_of, names_of, open_table
from data.sample import MARK, Turn, placed

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_KEYS = ("image", "path", "url", "image_url")  # in which a part of a message names its image
UNREAD = ("<bbox>", "<ref-object>", "<video>", "<audio>")  # placeholders of what is not read here
# Keys of a row or a message without which it means something else
CHANGES = re.compile(
    r"tools?|functions?|tool_calls|function_call|videos?|audios?|chosen|rejected\w*|positive\w*"
    r"|negative\w*|kto_tag|margin|loss|loss_scale|weight|train|training|thinking|reasoning\w*"
    r"|history|system_\w+|chat_template\w*",
    re.IGNORECASE,
)
READ = ("system", "image", "images", "messages", "conversations")  # as they are spelled
# `true` and 1 are what `train` and `weight` mean anyway
NOTHING: tuple[Any, ...] = (None, "", "[]", [], {}, True, 1)


@reads("llava", needs=FILE, may=("images",))
@reads("messages", needs=FILE, may=("images",))
def read_conversations(source: SourceConfig) -> Records:
    assert source.path
    path, parse = source.path, partial(parse_conversation, images=source.images)
    rows = TableRows(open_table(path), path) if path.endswith(".parquet") else json_rows(path)
    return Records(rows=rows, parse=parse)


def parse_conversation(row: Row, images: str | None) -> Record:
    messages, found = messages_of(row.value)
    system, turns = turns_of(messages, row.value.get("system"))
    check_places(turns, len(found))
    alone = len(found) == 1 and MARK in turns[0][0]
    (question, answer), *later = [(placed(q.replace(MARK, "") if alone else q).strip(), a) for q, a in turns]
    if any(a is None for _, a in later):
        raise ValueError("ends with a question without an answer")
    named, names = row.value.get("id") is not None, names_of(found)
    own: dict[str, Any] = {"question": question, "answers": () if answer is None else (answer,)}
    own |= {"id": name(row.value, "id") if named else row.where.rpartition("/")[2]}
    own |= {"image_id": " ".join(map(coco_number, names)) or row.where}
    own |= {"turns": tuple(Turn(question=q, answer=a or "") for q, a in later)}
    return Record(**fields_of([image_of(image, images) for image in found]), system=system, **own)


def turns_of(messages: list[tuple[str, str]], beside: str | None) -> tuple[str, list[tuple[str, str | None]]]:
    """The system prompt, and questions with their answers (None for a last one without)."""
    if not isinstance(beside, str | None):
        raise ValueError(f"'system' must be text, got {beside!r:.60}")
    system = beside or ""
    turns: list[tuple[str, str | None]] = []
    for role, words in messages:
        if role == "system":
            if turns or system not in ("", words):
                place = "one may stand in the first message or in the row's `system`"
                raise ValueError(f"has a system text behind a question, or two; {place}")
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


def messages_of(row: Any) -> tuple[list[tuple[str, str]], list[Any]]:
    """Role and words of each message, in either spelling, and the images that the row names."""
    is_llava = isinstance(row, dict) and row.get("conversations") is not None
    found = field(row, "conversations" if is_llava else "messages", list)
    for part in (row, *found):
        check_keys(part)
    beside = row.get("images") or row.get("image")
    images = [] if beside is None else [*beside] if isinstance(beside, list) else [beside]
    if is_llava:
        return [(text(message, "from"), text(message, "value")) for message in found], images
    inside: list[Any] = []
    messages = [(text(message, "role"), words_of(message, inside)) for message in found]
    if images and inside:
        raise ValueError("names images in the row and in its messages; name them in one place")
    return messages, images or inside


def check_keys(value: Any) -> None:
    """ValueError for a key that is not read and would change what a row or message means."""
    for key in value if isinstance(value, dict) else ():
        disliked = key == "label" and value[key] is False  # an answer that is not to be learned
        disliked |= str(key) not in READ and str(key).lower() in READ
        if disliked or (CHANGES.fullmatch(str(key)) and value[key] not in NOTHING):
            rest = "which is not read and changes what the row means; remove the key or the row"
            raise ValueError(f"has {key!r}: {value[key]!r:.40}, {rest}")


def words_of(message: Any, images: list[Any]) -> str:
    """The text of a message, or of a list of {"type": "text" | "image"}, whose images are added to `images`."""
    content = field(message, "content", str, list)
    if isinstance(content, str):
        return content
    words = []
    for part in content:
        kind = text(part, "type")
        if kind == "text":
            words.append(text(part, "text"))
        elif kind in ("image", "image_url"):
            words.append(MARK)
            named = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
            images.extend(n["url"] if isinstance(n, dict) and "url" in n else n for n in named)
        else:
            raise ValueError(f"unknown part {kind!r}; choices: text, image, image_url")
    return "".join(words)


def check_places(turns: list[tuple[str, str | None]], num_images: int) -> None:
    """The number of places for images must be that of images, all of them in questions."""
    words = [part for turn in turns for part in turn if part is not None]
    places = sum(part.count(MARK) for part in words)
    if places != num_images:
        raise ValueError(f"has {places} times {MARK} for {num_images} images")
    if any(MARK in (answer or "") for _, answer in turns):
        raise ValueError(f"has {MARK} in an answer, where no image can stand")
    for mark in UNREAD:
        if any(mark in part for part in words):
            raise ValueError(f"has {mark}, which is not read from this format")
