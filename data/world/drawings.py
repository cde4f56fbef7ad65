"""Single drawings with their names: what CLIP is pretrained on and tested with, without a download.

An image is an OpenMoji drawing (openmoji.org, CC BY-SA 4.0), turned and moved a little on a plain ground, or
two of them side by side. It is a function of (split, index, seed); nothing is stored. Names are Unicode's.

    names    one drawing in a style          -> its name, among all names of the data set
    kinds    one drawing                     -> its category
    pairs    two drawings                    -> "cat left of hammer", for retrieval
"""

import colorsys
import unicodedata
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from data.sample import Sample
from data.world.concepts import STYLES, check_choice
from data.world.scenes import render_svg, scene_rng, svg_file

SIZE = 60  # pixels, square
CATEGORIES = {  # ranges of code points
    "animal": ((0x1F400, 0x1F43E), (0x1F577, 0x1F577), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FABF)),
    "food": ((0x1F32D, 0x1F330), (0x1F33D, 0x1F33D), (0x1F345, 0x1F37F), (0x1F950, 0x1F96F),
             (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADF)),
    "vehicle": ((0x1F680, 0x1F6A4), (0x1F6B2, 0x1F6B2), (0x1F6E5, 0x1F6FC)),
    "clothing": ((0x1F451, 0x1F462), (0x1F97B, 0x1F97F), (0x1F9E2, 0x1F9E6), (0x1FA70, 0x1FA74)),
    "tool": ((0x1F4BB, 0x1F4FF), (0x1F526, 0x1F52E), (0x1F9EA, 0x1F9FF), (0x1FA91, 0x1FAAF)),
}  # fmt: skip
SIGNS = {"face", "sign", "symbol", "input", "no", "mobile", "hand", "with", "mark", "japanese"}
DRAWN = (*STYLES, "negative", "turned")  # the colours turned round; upside down
TASKS = ("names", "kinds", "pairs")
TEMPLATES = {"kinds": "a kind of {}", "pairs": "{}"}
STYLE_TEMPLATES = {  # of task names
    "color": "a drawing of {}", "line": "a line drawing of {}",
    "flat": "a flat drawing of {}", "negative": "a negative drawing of {}",
    "turned": "an upside-down drawing of {}",
}  # fmt: skip


@cache
def concepts() -> dict[str, dict[str, list[str]]]:
    """Category -> name -> code points of its drawings; `cat` and `cat face` are both a cat."""
    found: dict[str, dict[str, list[str]]] = {}
    for category, ranges in CATEGORIES.items():
        for code in (code for first, last in ranges for code in range(first, last + 1)):
            name = unicodedata.name(chr(code), "").lower().removesuffix(" face")
            plain = name and len(name.split()) <= 3 and not SIGNS & set(name.split())
            if plain and svg_file(f"{code:04X}").is_file():
                found.setdefault(category, {}).setdefault(name, []).append(f"{code:04X}")
    return found


@cache
def names(category: str | None = None) -> tuple[str, ...]:
    chosen = [category] if category else list(CATEGORIES)
    return tuple(dict.fromkeys(name for part in chosen for name in concepts()[part]))


class DrawingDataset:
    """Map-style: `len`, `[i] -> Sample`. Sample i shows class `i % len(names)`, so that
    `num_samples` is the number of classes times the shots of each; pairs are drawn at random.

    Raises ValueError for an unknown task or style.
    """

    def __init__(
        self,
        split: str,
        task: str,
        *,
        num_samples: int,
        style: str | None = None,
        template: str | None = None,
        expert: str | None = None,
        source: str | None = None,
        seed: int = 0,
    ):
        check_choice("task", task, TASKS)
        check_choice("style", style or "color", DRAWN)
        self.split, self.task, self.num_samples = split, task, num_samples
        self.style, self.expert, self.source = style or "color", expert, source or task
        self.seed = seed
        self.template = template or TEMPLATES.get(task, STYLE_TEMPLATES[self.style])
        self.choices = {"names": names(), "kinds": tuple(CATEGORIES), "pairs": ()}[task]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        rng = drawing_rng(self.split, index, self.seed)
        if self.task == "pairs":
            left, right = (str(name) for name in rng.choice(names(), size=2, replace=False))
            places = [(left, (0, SIZE // 2)), (right, (SIZE // 2, SIZE))]
            image, answer = _drawn(places, self.style, rng, (28, 30)), f"{left} left of {right}"
        else:
            name = names()[index % len(names())]
            image = draw(name, self.style, rng)
            answer = name if self.task == "names" else category_of(name)
        own: dict[str, Any] = {key: getattr(self, key) for key in ("choices", "task", "source", "expert")}
        own |= {"id": f"{self.split}/{self.source}/{index}", "question": self.template}
        own |= {"image_id": f"{self.split}-{self.task}-{self.style}-{self.seed}-{index}"}
        return Sample(image=image, answers=(answer,), tags=(self.style,), **own)


def drawing_rng(split: str, index: int, seed: int) -> np.random.Generator:
    """The generator of one image, equal on every machine and in every process."""
    return scene_rng(f"drawing/{split}", index, seed)


@cache
def category_of(name: str) -> str:
    return next(category for category, found in concepts().items() if name in found)


def draw(name: str, style: str, rng: np.random.Generator) -> Image.Image:
    """One drawing, 42 to 58 pixels wide, turned by up to 20 degrees."""
    return _drawn([(name, (0, SIZE))], style, rng, (42, 58))


def _drawn(
    places: list[tuple[str, tuple[int, int]]], style: str, rng: np.random.Generator, sizes: tuple[int, int]
) -> Image.Image:
    """Drawings, each between its left and right edge, on a plain pale or strong colour."""
    rgb = colorsys.hsv_to_rgb(rng.random(), 0.1 + 0.6 * rng.random(), 0.6 + 0.4 * rng.random())
    canvas = Image.new("RGB", (SIZE, SIZE), tuple(int(255 * part) for part in rgb))
    for name, across in places:
        codes = concepts()[category_of(name)][name]
        image = _render(codes[int(rng.integers(len(codes)))], STYLES.get(style, ""), SIZE)
        size = int(rng.integers(sizes[0], sizes[1] + 1))
        image = image.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR)
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        x, y = (int(rng.integers(low, max(low, high - size) + 1)) for low, high in (across, (0, SIZE)))
        canvas.paste(image, (x, y), image)
    change = {"negative": ImageOps.invert, "turned": lambda image: image.rotate(180)}.get(style)
    return change(canvas) if change else canvas


_render = lru_cache(maxsize=4096)(render_svg)
