"""Boxes as text: a table of conventions, applied when a batch is made and when an answer is read.

    box in original pixels --geometry--> frame --codec--> text, and back

The text is in the frame that the model sees (data/geometry.py), whatever was padded, cropped or
resized, so that an answer's place and the pixels' place are the same one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data.geometry import Geometry, intersect
from data.sample import Box

NUMBER = r"(-?\d+(?:\.\d+)?)"


def check_box(box: Box, width: int, height: int) -> None:
    """Raise ValueError unless 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        place = f"in its image of {width}x{height} pixels, with x0 < x1 and y0 < y1"
        raise ValueError(f"box {tuple(box)} (x0, y0, x1, y1) must lie {place}")


@dataclass(frozen=True, kw_only=True)
class BoxCodec:
    """One convention. A coordinate is written as a whole number of steps, the nearest one.

    `units` are the numbers along a side of the frame, None for its pixels; with `decimals` the step is a tenth, a
    hundredth ... of a unit. A box thinner than a step is written one step wide, so that every target can be read back.
    """

    box: str  # one box; {} stands for a number
    pattern: str  # the same as a regular expression; N stands for a number
    units: int | None
    decimals: int = 0
    y_first: bool = False
    joiner: str = ", "  # between boxes
    around: str = "{}"  # around all of them
    tokens: bool = False  # numbers are vocabulary entries: past the last one there is nothing

    def writes(self, token: str) -> bool:
        """Whether a token of a vocabulary is one that boxes are written with."""
        return re.sub(r"\d+", "{}", token) in self.box + self.around

    def steps(self, side: int) -> int:
        """How many steps a side of the frame has."""
        return (side if self.units is None else self.units) * 10**self.decimals

    def encode(self, boxes: Sequence[Box], geometry: Geometry) -> str:
        """Boxes of the original image as text; ValueError for one outside it, or that the frame does not show."""
        texts = [self.box.format(*self._numbers(box, geometry)) for box in boxes]
        return self.around.format(self.joiner.join(texts))

    def decode(self, text: str, geometry: Geometry) -> Box | None:
        """The first box in a text, in original pixels, cut at what the frame shows; None without one of any area."""
        found = re.search(self.pattern.replace("N", NUMBER), text)
        return None if found is None else self._box(found, geometry)

    def decode_all(self, text: str, geometry: Geometry) -> tuple[Box, ...]:
        """Every box in a text that has an area, as `decode` gives the first."""
        found = (self._box(match, geometry) for match in re.finditer(self.pattern.replace("N", NUMBER), text))
        return tuple(box for box in found if box is not None)

    def _box(self, found: re.Match[str], geometry: Geometry) -> Box | None:
        numbers = [float(number) for number in found.groups()]
        y0, x0, y1, x1 = numbers if self.y_first else [numbers[i] for i in (1, 0, 3, 2)]
        width, height = geometry.size
        unit_x, unit_y = self.units or width, self.units or height
        if (self.tokens and max(numbers) > unit_x) or x1 <= x0 or y1 <= y0:
            return None
        frame = x0 / unit_x * width, y0 / unit_y * height, x1 / unit_x * width, y1 / unit_y * height
        x0, y0, x1, y1 = intersect(geometry.to_source(frame), geometry.seen)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None

    def _numbers(self, box: Box, geometry: Geometry) -> list[str]:
        check_box(box, *geometry.source)
        shown = intersect(box, geometry.seen)
        if shown[0] == shown[2] or shown[1] == shown[3]:
            raise ValueError(f"box {tuple(box)} lies outside {geometry.seen}, what the model sees")
        x0, y0, x1, y1 = geometry.to_frame(shown)
        width, height = geometry.size
        left, right = whole_steps(x0 / width, x1 / width, self.steps(width))
        top, bottom = whole_steps(y0 / height, y1 / height, self.steps(height))
        ordered = (top, left, bottom, right) if self.y_first else (left, top, right, bottom)
        if self.tokens:
            return [f"{number:04d}" for number in ordered]
        return [f"{number / 10**self.decimals:.{self.decimals}f}" for number in ordered]


def whole_steps(low: float, high: float, last: int) -> tuple[int, int]:
    """Two shares of a side as the nearest of `last` steps, at least one apart."""
    first, second = round(low * last), round(high * last)
    if first == second:
        first = min(math.floor(low * last), last - 1)
        second = first + 1
    return first, second


def location_tokens(num_bins: int) -> BoxCodec:
    """`<loc0000>` for y0 x0 y1 x1, bin k at k / (num_bins - 1) of the side (PaliGemma, arXiv 2407.07726, 3.2.2)."""
    return BoxCodec(
        box="<loc{}>" * 4, pattern=r"\s*".join([r"<loc(\d{4})>"] * 4), joiner="; ",
        units=num_bins - 1, y_first=True, tokens=True,
    )  # fmt: skip


LIST = r"\[\s*N\s*,\s*N\s*,\s*N\s*,\s*N"
CORNERS = r"\(\s*N\s*,\s*N\s*\)\s*,\s*\(\s*N\s*,\s*N\s*\)"
LIST_BOX, JSON_BOX = "[{}, {}, {}, {}]", '{{"bbox_2d": [{}, {}, {}, {}]}}'
QWEN2_BOX = "<|box_start|>({},{}),({},{})<|box_end|>"
CODECS = {
    "location_tokens": location_tokens(32),  # of the embedded base
    "paligemma": location_tokens(1024),
    # LLaVA-1.5: its frame is the square-padded image where the processor pads (do_pad)
    "llava": BoxCodec(box=LIST_BOX, pattern=LIST, units=1, decimals=2, joiner="; "),
    "shikra": BoxCodec(  # arXiv 2306.15195, 3.1
        box="{},{},{},{}", pattern=r"[\[;]" + LIST[2:], units=1, decimals=3, joiner=";", around="[{}]"
    ),
    "qwen_vl": BoxCodec(box="<box>({},{}),({},{})</box>", pattern=CORNERS, units=1000, joiner=""),
    "qwen2_vl": BoxCodec(box=QWEN2_BOX, pattern=CORNERS, units=1000, joiner=""),
    "qwen2_5_vl": BoxCodec(box=JSON_BOX, pattern=LIST, units=None, around="[{}]"),
    "qwen3_vl": BoxCodec(box=JSON_BOX, pattern=LIST, units=1000, around="[{}]"),
    "internvl": BoxCodec(box=LIST_BOX, pattern=LIST, units=1000, around="<box>[{}]</box>"),
}
