"""Fields of a row, checked: what is missing or of another type is one ValueError that names it."""

from collections.abc import Sequence
from typing import Any

from data.sample import Box

KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}


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


def texts(row: Any, key: str) -> tuple[str, ...]:
    values = field(row, key, list)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} must be a list of texts, got {values!r:.60}")
    return tuple(values)


def answers_of(row: Any, key: str) -> tuple[str, ...]:
    """The `answer` of each entry of a list of objects, as the VQA family writes them."""
    return tuple(text(entry, "answer") for entry in field(row, key, list))


def box_of(values: Any) -> Box:
    """Four numbers x0, y0, x1, y1."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 4:
        raise ValueError(f"a box is four numbers, got {values!r:.60}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"a box is four numbers, got {values!r:.60}")
    x0, y0, x1, y1 = map(float, values)
    return x0, y0, x1, y1


def box_of_xywh(values: Any) -> Box:
    """The box of COCO's x, y, width, height."""
    x, y, width, height = box_of(values)
    return x, y, x + width, y + height


def tags_of(row: dict[str, Any], *keys: str) -> tuple[str, ...]:
    """The texts that the row has under `keys`, for scores by kind."""
    return tuple(row[key] for key in keys if isinstance(row.get(key), str) and row[key])
