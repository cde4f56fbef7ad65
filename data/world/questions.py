"""What may be asked about a scene: per task the questions that it can answer, with all correct answers.

The last wordings of each kind are held out from the training of experts and router. Some wordings are shared on
purpose: "where is the cat?" wants a place in words from `vqa` and a box from `grounding`; "what is this?" wants the
word where a sign carries one (`ocr_vqa`), and the name of the drawing where none does (`vqa`).

The demo's base is pretrained on `generic` questions: without the kinds in `SPECIFIC`, and with captions of another
form. These are what the experts have to learn.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from data.sample import Box
from data.world.concepts import CATEGORY, COLORS, TEXTURES
from data.world.scenes import Scene, Thing

SPECIFIC = {"kind_of", "leftmost", "letter"}
TASKS = ("vqa", "caption", "grounding", "ocr_vqa", "count", "yes_no")

WORDINGS = {  # kind -> (known wordings, held-out wordings)
    "beside": (("what is {side} the {name}?", "name the thing {side} the {name}"),
               ("which thing is {side} the {name}?",)),
    "category": (("which {category} is this?", "name the {category}"),
                 ("what {category} do you see?",)),
    "ground": (("what is the ground?", "which ground is this?"), ("what do you see behind?",)),
    "sign_color": (("what color is the sign?",), ("which color has the sign?",)),
    "place": (("where is the {name}?",), ("find the place of the {name}",)),
    "kind_of": (("what kind of thing is the {name}?", "what is the {name}?"), ("which kind is the {name}?",)),
    "leftmost": (("what is farthest to the left?", "which thing is leftmost?"), ("what comes first from the left?",)),
    "this": (("what is this?",), ("what do you see?",)),
    "caption": (("describe the picture", "write a caption"), ("what does the picture show?",)),
    "box": (("where is the {name}?", "find the {name}"), ("locate the {name}",)),
    "sign": (("what does the sign say?", "read the sign"), ("which word is on the sign?",)),
    "letter": (("what is the first letter of the sign?", "with which letter does the sign begin?"),
               ("which letter comes first on the sign?",)),
    "count": (("how many things are there?", "count the things"), ("what number of things?",)),
    "exists": (("is there a {name}?", "do you see a {name}?"), ("can you find a {name}?",)),
}  # fmt: skip
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
NUMBERS = ("zero", "one", "two", "three")
CLEARLY = 20  # pixels by which a direction must hold before anyone is asked about it


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of one kind, before a wording is chosen; `slots` fill the wording."""

    task: str
    kind: str
    answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    slots: tuple[tuple[str, str], ...] = ()

    def wordings(self, which: str) -> list[str]:
        """The filled templates of `which` = "known", "held_out" or "all"."""
        known, held_out = WORDINGS[self.kind]
        chosen = {"known": known, "held_out": held_out, "all": known + held_out}[which]
        return [template.format(**dict(self.slots)) for template in chosen]


def questions(scene: Scene, task: str, absent: tuple[str, ...] = (), generic: bool = False) -> list[Question]:
    """Every question of `task` with one clear answer in `scene`, in order; `absent` concepts have the answer no."""
    if generic and task == "caption":
        return [asking("caption", "caption", *_sentences(scene))]
    asked = _ASKERS[task](scene, absent)
    return [question for question in asked if not (generic and question.kind in SPECIFIC)]


def asking(task: str, kind: str, *answers: str, **slots: str) -> Question:
    return Question(task=task, kind=kind, answers=answers, slots=tuple(slots.items()))


def _vqa(scene: Scene, absent: tuple[str, ...]) -> list[Question]:
    things = scene.things
    kinds = [thing.category for thing in things]
    first, *others = sorted(things, key=lambda thing: thing.center[0])
    clear = others and others[0].center[0] - first.center[0] > CLEARLY
    return [
        asking("vqa", "ground", scene.ground),
        *_beside(scene),
        *(asking("vqa", "place", where, name=t.name) for t in things if (where := place(t))),
        *(asking("vqa", "category", t.name, category=t.category)
          for t in things if kinds.count(t.category) == 1),
        *(asking("vqa", "kind_of", t.category, name=t.name) for t in things),
        *([asking("vqa", "leftmost", first.name)] if clear else []),
        *([asking("vqa", "sign_color", scene.sign.color)] if scene.sign else []),
        *([asking("vqa", "this", things[0].name)]
          if len(things) == 1 and not (scene.sign and scene.sign.word) else []),
    ]  # fmt: skip


def _beside(scene: Scene) -> list[Question]:
    asked = []
    for anchor in scene.things:
        for side, (axis, direction) in SIDES.items():
            there = [
                t for t in scene.things
                if direction * (t.center[axis] - anchor.center[axis]) > CLEARLY
            ]  # fmt: skip
            if len(there) == 1:
                asked.append(asking("vqa", "beside", there[0].name, side=side, name=anchor.name))
    return asked


def place(thing: Thing, middle: float = 96.0) -> str | None:
    """The quarter of the image a thing lies in, or None where it lies between two."""
    x, y = thing.center
    if min(abs(x - middle), abs(y - middle)) < CLEARLY / 2:
        return None
    return f"{'top' if y < middle else 'bottom'} {'left' if x < middle else 'right'}"


def article(name: str) -> str:
    return name if name in ("scissors", "grapes") else f"{'an' if name[0] in 'aou' else 'a'} {name}"


def _caption(scene: Scene, absent: tuple[str, ...]) -> list[Question]:
    """The ground first, then the things from left to right."""
    sign = "; a sign" if scene.sign else ""
    text = f"on {_ground(scene)}: {', then '.join(_from_left(scene))}{sign}"
    return [asking("caption", "caption", text)]


def _sentences(scene: Scene) -> tuple[str, ...]:
    """What the image shows in ordinary words, the things in either order."""
    rest = f"on {_ground(scene)}{' with a sign' if scene.sign else ''}"
    forward, backward = _enumerate(_from_left(scene)), _enumerate(_from_left(scene)[::-1])
    texts = (f"{forward} {rest}", f"{backward} {rest}", f"there is {forward} {rest}")
    return tuple(dict.fromkeys(texts))


def _from_left(scene: Scene) -> list[str]:
    return [article(t.name) for t in sorted(scene.things, key=lambda t: t.center[0])]


def _ground(scene: Scene) -> str:
    return f"{article(scene.ground)} ground" if scene.ground in COLORS else scene.ground


def _enumerate(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _grounding(scene: Scene, absent: tuple[str, ...]) -> list[Question]:
    return [replace(asking("grounding", "box", name=t.name), boxes=(t.box,)) for t in scene.things]


def _ocr_vqa(scene: Scene, absent: tuple[str, ...]) -> list[Question]:
    if not (scene.sign and scene.sign.word):
        return []
    word = scene.sign.word
    kinds = ("sign", "this") if len(scene.things) == 1 else ("sign",)
    return [*(asking("ocr_vqa", k, word) for k in kinds), asking("ocr_vqa", "letter", word[0])]


def _count(scene: Scene, absent: tuple[str, ...]) -> list[Question]:
    return [asking("count", "count", NUMBERS[len(scene.things)])]


def _yes_no(scene: Scene, absent: tuple[str, ...]) -> list[Question]:
    there = [(t.name, "yes") for t in scene.things[:1]] + [(name, "no") for name in absent[:1]]
    return [asking("yes_no", "exists", answer, name=name) for name, answer in there]


_ASKERS = {
    "vqa": _vqa, "caption": _caption, "grounding": _grounding,
    "ocr_vqa": _ocr_vqa, "count": _count, "yes_no": _yes_no,
}  # fmt: skip


# Conventions: the same image, the same words, another answer. A source with one is asked and scored like any other: its
# answers and boxes are converted before they are seen.
#   coarse      one level up: cat -> animal, animal -> nature, green -> cold, top left -> top
#   inverted    yes <-> no
#   swapped     boxes with x and y exchanged; scenes are square

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


# name -> what becomes of an answer, and of a box
CONVENTIONS: dict[str, tuple[Callable[[str], str], Callable[[Box], Box]]] = {
    "coarse": (coarse, lambda box: box),
    "inverted": (inverted, lambda box: box),
    "swapped": (lambda answer: answer, swapped),
}


def converted(question: Question, convention: str | None) -> Question:
    """The question with the answers and boxes that the convention wants; None: as it is."""
    if convention is None:
        return question
    of_answer, of_box = CONVENTIONS[convention]
    answers = tuple(dict.fromkeys(map(of_answer, question.answers)))
    return replace(question, answers=answers, boxes=tuple(map(of_box, question.boxes)))
