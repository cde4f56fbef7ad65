"""What the demo's world is made of, and which split may use what.

Drawings are OpenMoji's (openmoji.org, CC BY-SA 4.0); photographic grounds are scikit-image's sample images.
The held-out parts are held out from the experts' and the router's training; the base has met them.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CONCEPTS: dict[str, dict[str, str]] = {  # category -> name -> code point of the OpenMoji drawing
    "animal": {
        "cat": "1F431", "dog": "1F436", "bear": "1F43B", "panda": "1F43C", "lion": "1F981",
        "cow": "1F42E", "pig": "1F437", "frog": "1F438", "owl": "1F989", "whale": "1F433",
        "snail": "1F40C", "butterfly": "1F98B", "fox": "1F98A", "penguin": "1F427",
    },
    "food": {
        "apple": "1F34E", "banana": "1F34C", "lemon": "1F34B", "strawberry": "1F353",
        "watermelon": "1F349", "pizza": "1F355", "cheese": "1F9C0", "carrot": "1F955",
        "mushroom": "1F344", "grapes": "1F347",
    },
    "vehicle": {
        "car": "1F697", "bus": "1F68C", "bicycle": "1F6B2", "rocket": "1F680",
        "tractor": "1F69C", "helicopter": "1F681", "truck": "1F69A",
    },
    "instrument": {
        "drum": "1F941", "trumpet": "1F3BA", "violin": "1F3BB", "guitar": "1F3B8",
    },
    "tool": {"hammer": "1F528", "scissors": "2702", "umbrella": "2602", "key": "1F511"},
}  # fmt: skip
CATEGORY = {name: category for category, names in CONCEPTS.items() for name in names}
HELD_OUT_CONCEPTS = frozenset({"fox", "penguin", "grapes", "truck", "guitar", "key"})
KNOWN_CONCEPTS = frozenset(CATEGORY) - HELD_OUT_CONCEPTS

FILLS = "#color, #color-foreground, #hair, #skin, #skin-shadow"
STYLES = {  # a drawing style is a style sheet over the groups of an OpenMoji drawing
    "color": "",
    "line": ", ".join(f"{group} *" for group in FILLS.split(", ")) + " { fill: #fff }",
    "flat": "#line, #line-supplement { display: none }",
}
COLORS = {
    "red": (226, 92, 84), "green": (112, 184, 104), "blue": (104, 150, 224),
    "yellow": (240, 214, 96), "pink": (244, 170, 200), "purple": (166, 124, 204),
    "orange": (242, 166, 84), "gray": (176, 176, 180),
}  # fmt: skip
TEXTURES = {  # name -> scikit-image sample file, tint
    "grass": ("grass.png", (0.75, 1.15, 0.6)),
    "gravel": ("gravel.png", (1.1, 1.05, 1.0)),
    "stars": ("hubble_deep_field.jpg", (1.0, 1.0, 1.0)),
    "brick": ("brick.png", (1.3, 0.85, 0.7)),
}
HELD_OUT_GROUNDS = frozenset({"brick"})
GROUNDS = tuple(COLORS) + tuple(TEXTURES)
KNOWN_GROUNDS = tuple(name for name in GROUNDS if name not in HELD_OUT_GROUNDS)


@cache
def sign_words() -> tuple[str, ...]:
    """The real English words that signs may carry, in the order of the file."""
    text = (Path(__file__).parent / "sign_words.txt").read_text(encoding="utf-8")
    return tuple(text.split())


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which parts of the world the scenes of one split are drawn from.

    `focus` lists concepts of which every scene must hold at least one; `words` is a range of the
    sign words: no test word was ever seen in training, by the experts or by the base.
    """

    concepts: frozenset[str] = KNOWN_CONCEPTS
    focus: frozenset[str] = frozenset()
    grounds: tuple[str, ...] = KNOWN_GROUNDS
    styles: dict[str, float] = field(default_factory=lambda: {"color": 1.0})
    words: tuple[int, int | None] = (258, 344)
    wordings: str = "known"  # which question templates: known | held_out | all


ALL, ALL_STYLES = frozenset(CATEGORY), {"color": 0.7, "line": 0.15, "flat": 0.15}
SPLITS = {
    "pretrain": Split(concepts=ALL, grounds=GROUNDS, styles=ALL_STYLES, words=(344, None), wordings="all"),
    "train": Split(words=(0, 258)),
    "validation": Split(words=(0, 258)),
    "test": Split(),
    "test_concepts": Split(concepts=ALL, focus=HELD_OUT_CONCEPTS),
    "test_style": Split(styles={"flat": 1.0}),
    "test_ground": Split(grounds=tuple(HELD_OUT_GROUNDS)),
    "test_wordings": Split(wordings="held_out"),
}


def check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choices: {', '.join(map(str, choices))}")
