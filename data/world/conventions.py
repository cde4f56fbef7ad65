"""Ways to answer that contradict each other: the same image, the same words, another answer.

A source with a convention is asked and scored like any other: its answers and boxes are converted before they are seen.

    coarse      one level up: cat -> animal, animal -> nature, green -> cold, top left -> top
    inverted    yes <-> no
    swapped     boxes with x and y exchanged; scenes are square
"""

from collections.abc import Callable
from dataclasses import replace

from data.sample import Box
from data.world.concepts import CATEGORY, COLORS, TEXTURES
from data.world.questions import Question

NATURE = ("animal", "food")
WARM = ("red", "yellow", "pink", "orange")
INVERSE = {"yes": "no", "no": "yes"}


def coarse(answer: str) -> str:
    """ValueError for an answer that has nothing above it."""
    if answer in CATEGORY:
        return CATEGORY[answer]
    if answer in CATEGORY.values():
        return "nature" if answer in NATURE else "object"
    if answer in COLORS:
        return "warm" if answer in WARM else "cold"
    if answer in TEXTURES:
        return "photo"
    side, _, other = answer.partition(" ")
    if side in ("top", "bottom") and other in ("left", "right"):
        return side
    raise ValueError(f"convention coarse: has no answer in place of {answer!r}")


def inverted(answer: str) -> str:
    """ValueError for another answer than yes and no."""
    if answer not in INVERSE:
        raise ValueError(f"convention inverted: is for yes and no, got {answer!r}")
    return INVERSE[answer]


def swapped(box: Box) -> Box:
    x0, y0, x1, y1 = box
    return y0, x0, y1, x1


def keep(answer: str) -> str:
    return answer


def keep_box(box: Box) -> Box:
    return box


# name -> what becomes of an answer, and of a box
CONVENTIONS: dict[str, tuple[Callable[[str], str], Callable[[Box], Box]]] = {
    "coarse": (coarse, keep_box),
    "inverted": (inverted, keep_box),
    "swapped": (keep, swapped),
}


def converted(question: Question, convention: str | None) -> Question:
    """The question with the answers and boxes that the convention wants; None: as it is."""
    if convention is None:
        return question
    of_answer, of_box = CONVENTIONS[convention]
    answers = tuple(dict.fromkeys(map(of_answer, question.answers)))
    return replace(question, answers=answers, boxes=tuple(map(of_box, question.boxes)))
