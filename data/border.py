"""A frame around an image that says what is asked of it: whatever sees the image alone sees question and task.

    corners    the number of the task (its place in data.tasks, from 1; 0 where it is unknown or withheld) on its colour
    sides      the question's words, clockwise from the top left, over and over; smaller letters where they do not fit

The frame grows the image by a share of its longer side on each side, and boxes move with it: data/prompt.py puts the
growth ahead of the processor's own geometry.
"""

import colorsys
import math
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from data.geometry import Geometry, whole

GAP = "   "  # between a question and its repetition
INK, PAPER = "black", "white"
TURNS = (0, 270, 180, 90)  # degrees, counterclockwise, of the strips: top, right, bottom, left


def border_of(size: tuple[int, int], share: float) -> int:
    """Pixels on each side."""
    return math.ceil(share * max(size))


def bordered(width: int, height: int, share: float) -> Geometry:
    """Where the pixels of an image go."""
    return whole(width, height).pad(*[border_of((width, height), share)] * 4)


def draw_border(image: Image.Image, share: float, question: str, task_id: int) -> Image.Image:
    """The image in its frame; `task_id` counts from 0, and is -1 where the task is not to be seen."""
    side, (width, height) = border_of(image.size, share), image.size
    framed = Image.new("RGB", (width + 2 * side, height + 2 * side), PAPER)
    framed.paste(image, (side, side))
    around = words_in_a_row(" ".join(question.split()), 2 * (width + height), side)
    ways, start = ((side, 0), (side + width, side), (side, side + height), (0, side)), 0
    for place, turn, length in zip(ways, TURNS, (width, height, width, height), strict=True):
        strip = around.crop((start, 0, start + length, side))
        framed.paste(strip.rotate(turn, expand=True), place)
        start += length
    code = number_on_colour(task_id, side)
    for corner in ((0, 0), (side + width, 0), (0, side + height), (side + width, side + height)):
        framed.paste(code, corner)
    return framed


def words_in_a_row(text: str, length: int, height: int) -> Image.Image:
    """A strip that the text fills, once whole or more often."""
    row = Image.new("RGB", (length, height), PAPER)
    if not text:
        return row
    size = max(height - 2, 1)
    while size > 1 and font(size).getlength(text) > length:
        size -= 1
    pen, step = ImageDraw.Draw(row), max(font(size).getlength(text + GAP), 1.0)
    for number in range(max(int((length + font(size).getlength(GAP)) / step), 1)):
        pen.text((number * step, height / 2), text, INK, font(size), anchor="lm")
    return row


def number_on_colour(task_id: int, side: int) -> Image.Image:
    """Hues a golden angle apart, so that each task's is its own whatever their number; grey for none."""
    hue = (0.618034 * task_id) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.45 if task_id >= 0 else 0.0, 1.0 if task_id >= 0 else 0.75)
    square = Image.new("RGB", (side, side), (round(255 * red), round(255 * green), round(255 * blue)))
    size = max(side - 2, 1)
    while size > 1 and font(size).getlength(str(task_id + 1)) > side:
        size -= 1
    ImageDraw.Draw(square).text((side / 2, side / 2), str(task_id + 1), INK, font(size), anchor="mm")
    return square


@lru_cache(256)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
