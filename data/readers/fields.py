"""Fields of a row, checked: what is missing or of another type is one ValueError that names it.

Cells of tables may also be objects, as the hub's data sets have them: `cell_texts`.
"""

import ast
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from data.sample import Box, OcrWord

KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
TEXT_KEYS = ("answer", "text", "caption", "label", "value", "raw")  # of an object that is a text


def field(row: Any, key: str, *kinds: type) -> Any:
    """`row[key]`, which must be of one of `kinds`; ValueError that names the key."""
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with {key!r}, got {type(row).__name__}")
    if key not in row:
        raise ValueError(f"lacks {key!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    value = row[key]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
        raise ValueError(f"{key!r} must be {names}, got {value!r:.60}")
    return value


def text(row: Any, key: str) -> str:
    return field(row, key, str)


def name(row: Any, key: str) -> str:
    """An id as text, from text or a whole number."""
    return str(field(row, key, str, int))


def texts(row: Any, key: str, *, missing: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The list of texts; `missing` where the row lacks the key, which is an error without it."""
    if missing is not None and key not in row:
        return missing
    values = field(row, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} must be a list of texts, got {values!r:.60}")
    return tuple(values)


def answers_of(row: Any, key: str) -> tuple[str, ...]:
    """The `answer` of each entry of a list of objects, as the VQA family writes them."""
    return tuple(text(entry, "answer") for entry in field(row, key, list))


def cell_texts(value: Any, column: str) -> tuple[str, ...]:
    """The texts of a cell, one or a list: texts, whole numbers, or objects with one; ValueError names the column."""
    if isinstance(value, dict):
        value = text_member(value, column)
    if value is None:
        return ()
    if isinstance(value, str):
        check_plain(value, column)
    return tuple(cell_text(v, column) for v in (value if isinstance(value, list) else [value]))


def check_plain(value: str, column: str) -> None:
    """ValueError for a text that is a list of texts or an `answer`, written out by JSON or by Python."""
    found = written_out(value) if value.lstrip()[:1] in ("[", "{") else None
    parts = found if isinstance(found, list) else [found]
    if not parts:
        return
    texts = isinstance(found, list) and all(isinstance(part, str) for part in parts)
    if texts or all(isinstance(part, dict) and "answer" in part for part in parts):
        raise ValueError(
            f"column {column!r} holds {value!r:.60}, a list or an object written as text, which would be "
            "learned as it is: write one answer a cell, or lists in a JSON or Parquet file"
        )


def written_out(value: str) -> Any:
    """The value that JSON or Python writes so; None for other texts."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return read(value)
    return None


def cell_text(value: Any, column: str) -> str:
    if isinstance(value, dict):
        value = text_member(value, column)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    rule = "only texts and whole numbers are read: store it as text"
    raise ValueError(f"column {column!r} holds {value!r:.60} ({type(value).__name__}); {rule}")


def text_member(value: dict[str, Any], column: str) -> Any:
    """The value of the only one of TEXT_KEYS that an object has."""
    found = [key for key in TEXT_KEYS if value.get(key) is not None]
    if len(found) == 1:
        return value[found[0]]
    rule = f"exactly one of {', '.join(TEXT_KEYS)} is read: store its text alone"
    raise ValueError(f"column {column!r} holds an object with {', '.join(map(str, value))}; {rule}")


def box_of(values: Any) -> Box:
    """Four numbers x0, y0, x1, y1."""
    numbers = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 4
    if numbers and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        with suppress(OverflowError):
            x0, y0, x1, y1 = map(float, values)
            return x0, y0, x1, y1
    raise ValueError(f"a box is four numbers, got {values!r:.60}")


def box_of_xywh(values: Any) -> Box:
    """The box of COCO's x, y, width, height."""
    x, y, width, height = box_of(values)
    return x, y, x + width, y + height


def json_cell(value: Any, column: str, shape: str) -> Any:
    """The list of a cell, or of the JSON in it; None where there is nothing. ValueError otherwise."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = value
    if found is None or isinstance(found, list):
        return found
    raise ValueError(f"{column!r} must be {shape}, got {value!r:.60}")


def boxes_of(value: Any) -> tuple[Box, ...]:
    return tuple(map(box_of, json_cell(value, "boxes", "[[x0, y0, x1, y1], ...]") or ()))


def frame_of(value: Any, boxes: Sequence[Box], words: Sequence[OcrWord] = ()) -> Any:
    """The width and height that boxes are given in; None for pixels. ValueError for boxes that all lie in [0, 1]."""
    frame = json_cell(value, "frame", "[width, height]")
    if frame is not None:
        if len(frame) != 2 or not all(isinstance(side, int | float) for side in frame):
            raise ValueError(f"'frame' must be [width, height], got {value!r:.60}")
        return tuple(frame)
    for kind in (boxes, [word.box for word in words]):
        if kind and all(0 <= edge <= 1 for box in kind for edge in box):
            advice = "for shares of the image give the row `frame`: [1, 1]"
            inside = f"all of {[*kind]!r:.60} lie in [0, 1]"
            raise ValueError(f"boxes are read in pixels, and {inside}; {advice}")
    return None


def number_of(value: Any, key: str) -> int | None:
    """The number of an image, from 0; None where there is none."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value.isdecimal():  # a cell of a CSV
        return int(value)
    raise ValueError(f"{key!r} must be the number of an image, from 0, got {value!r:.60}")


def tags_of(row: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """The texts that the row has under `keys`, for scores by kind."""
    return tuple(row[key] for key in keys if isinstance(row.get(key), str) and row[key])
