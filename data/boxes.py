"""Boxes as text: one codec per convention, chosen at collation.

A codec works on boxes in pixels of the original picture, and must be used with the whole picture
resized to the model's input (no crop, no padding), so that 0..1 of the one is 0..1 of the other.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from data.sample import Box


@dataclass(frozen=True, kw_only=True)
class BoxCodec:
    """`encode(box, width, height) -> text` and back; `decode` gives None for no readable box."""

    encode: Callable[[Box, int, int], str]
    decode: Callable[[str, int, int], Box | None]


def check_box(box: Box, width: int, height: int) -> None:
    """Raise ValueError unless 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"box {tuple(box)} (x0, y0, x1, y1) must lie in its picture of {width}x{height} pixels,"
            " with x0 < x1 and y0 < y1"
        )


def encode_locations(box: Box, width: int, height: int, num_bins: int = 32) -> str:
    """Four tokens `<loc0000>`, in the order y0 x0 y1 x1 (PaliGemma, arXiv 2407.07726, 3.2.2).

    Bin k stands for k / (num_bins - 1) of the picture's side, so that both edges are exact and the
    error is at most half a step; a box thinner than a step is written one step wide, so that every
    target can be read back. Raises ValueError for a box outside its picture.
    """
    check_box(box, width, height)
    x0, y0, x1, y1 = box
    left, right = _bins(x0 / width, x1 / width, num_bins - 1)
    top, bottom = _bins(y0 / height, y1 / height, num_bins - 1)
    return "".join(f"<loc{number:04d}>" for number in (top, left, bottom, right))


def _bins(low: float, high: float, last: int) -> tuple[int, int]:
    first, second = round(low * last), round(high * last)
    if first == second:
        first = min(math.floor(low * last), last - 1)
        second = first + 1
    return first, second


def decode_locations(text: str, width: int, height: int, num_bins: int = 32) -> Box | None:
    """The first four location tokens in a row as a box; None where there are none in order.

    None too where a number is past the last bin, or the box has no area (x1 <= x0 or y1 <= y0).
    """
    found = re.search(r"\s*".join([r"<loc(\d{4})>"] * 4), text)
    if found is None:
        return None
    bins = [int(number) for number in found.groups()]
    y0, x0, y1, x1 = (number / (num_bins - 1) for number in bins)
    if max(bins) >= num_bins or x1 <= x0 or y1 <= y0:
        return None
    return x0 * width, y0 * height, x1 * width, y1 * height


CODECS = {"location_tokens": BoxCodec(encode=encode_locations, decode=decode_locations)}
