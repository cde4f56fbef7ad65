"""Where an image's pixels go on their way to the model, for the pixels and for boxes alike.

    original image --pad, resize, crop in any order--> frame: what the model sees
    x' = scale * x + offset, on each axis;  `seen` is what is left of the original

Boxes are data in original pixels; a codec (data/boxes.py) writes them in the frame's, and brings an
answer back through the inverse. `seen_by` builds the geometry from an image processor's settings.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from PIL import Image

from data.sample import Box

Size = tuple[int, int]  # width, height
TILING = ("image_grid_pinpoints", "do_image_splitting", "crop_to_patches", "do_pan_and_scan")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """An axis-aligned map from the pixels of an image to those of a frame, made by `whole`."""

    source: Size
    size: Size  # of the frame
    scale: tuple[float, float]
    offset: tuple[float, float]
    seen: Box  # the part of the source that the frame shows, in source pixels

    def then(self, following: "Geometry") -> Self:
        """Both, one after the other; ValueError unless `following` starts at this one's frame."""
        if following.source != self.size:
            raise ValueError(f"a frame of {self.size} cannot continue as one of {following.source}")
        pairs = zip(self.scale, self.offset, following.scale, following.offset, strict=True)
        steps = [(first * second, shift * second + move) for first, shift, second, move in pairs]
        (scale_x, offset_x), (scale_y, offset_y) = steps
        scale, offset = (scale_x, scale_y), (offset_x, offset_y)
        seen = intersect(self.seen, self.to_source(following.seen))
        return replace(self, size=following.size, scale=scale, offset=offset, seen=seen)

    def resize(self, width: int, height: int) -> Self:
        scale = (width / self.size[0], height / self.size[1])
        return self.then(replace(whole(*self.size), size=(width, height), scale=scale))

    def crop(self, left: int, top: int, width: int, height: int) -> Self:
        """The window of the frame at (left, top); where it reaches beyond the frame, it pads."""
        window = (float(left), float(top), float(left + width), float(top + height))
        before, offset = whole(*self.size), (-float(left), -float(top))
        seen = intersect(before.seen, window)
        return self.then(replace(before, size=(width, height), offset=offset, seen=seen))

    def pad(self, left: int, top: int, right: int, bottom: int) -> Self:
        width, height = self.size
        return self.crop(-left, -top, width + left + right, height + top + bottom)

    def to_frame(self, box: Box) -> Box:
        """A box of the source in pixels of the frame, also where it reaches out of it."""
        (a, b), (c, d) = self.scale, self.offset
        return box[0] * a + c, box[1] * b + d, box[2] * a + c, box[3] * b + d

    def to_source(self, box: Box) -> Box:
        """The inverse of `to_frame`."""
        (a, b), (c, d) = self.scale, self.offset
        return (box[0] - c) / a, (box[1] - d) / b, (box[2] - c) / a, (box[3] - d) / b

    def hidden(self, box: Box) -> float:
        """The share of a source box's area that the frame does not show."""
        return 1.0 - area(intersect(box, self.seen)) / area(box)

    def pixels(self, image: Image.Image, fill: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
        """The image as the frame shows it; `fill` is the colour of padding."""
        if image.size != self.source:
            raise ValueError(f"a geometry of {self.source} got an image of {image.size}")
        frame = Image.new("RGB", self.size, fill)
        left, top, right, bottom = map(round, self.to_frame(self.seen))
        if right > left and bottom > top:
            part = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC, self.seen)
            frame.paste(part, (left, top))
        return frame


def whole(width: int, height: int) -> Geometry:
    """The image as it is: where every geometry starts."""
    size, seen = (width, height), (0.0, 0.0, float(width), float(height))
    return Geometry(source=size, size=size, scale=(1.0, 1.0), offset=(0.0, 0.0), seen=seen)


def intersect(first: Box, second: Box) -> Box:
    """What two boxes share; without area, and never negative, where they share nothing."""
    x0, y0 = max(first[0], second[0]), max(first[1], second[1])
    return x0, y0, max(x0, min(first[2], second[2])), max(y0, min(first[3], second[3]))


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def seen_by(image_processor: Any, width: int, height: int) -> Geometry:
    """The frame that a Hugging Face image processor makes of an image, by its own settings.

    Processors that cut images into tiles (any resolution) show all of it: their boxes refer to
    the original. Raises ValueError for settings that are not understood.
    """
    start = whole(width, height)
    if any(is_set(image_processor, name) for name in TILING):
        return start
    size = sizes_of(image_processor, "size")
    if is_set(image_processor, "merge_size"):  # Qwen-VL: the sizes are numbers of pixels
        step = image_processor.patch_size * image_processor.merge_size
        return start.resize(*pixel_budget(width, height, step, **size))
    if is_set(image_processor, "do_pad"):
        if not hasattr(image_processor, "pad_to_square"):
            choices = "false, or an image processor that pads to a square (LlavaImageProcessor)"
            kind = f"do_pad of {type(image_processor).__name__}"
            raise ValueError(f"{kind} fills batches up, so boxes have no frame; choices: {choices}")
        start = pad_to_square(start)
    if image_processor.do_resize:
        start = start.resize(*resized(start.size, size))
    if is_set(image_processor, "do_center_crop"):
        crop = sizes_of(image_processor, "crop_size")
        left, top = (start.size[0] - crop["width"]) // 2, (start.size[1] - crop["height"]) // 2
        start = start.crop(left, top, crop["width"], crop["height"])
    return start


def is_set(image_processor: Any, name: str) -> bool:
    return bool(getattr(image_processor, name, None))


def sizes_of(image_processor: Any, name: str) -> dict[str, int]:
    """The entries that are set of a size, which is a dict or transformers' SizeDict."""
    return {key: int(value) for key, value in dict(getattr(image_processor, name)).items() if value}


def resized(size: Size, wanted: dict[str, int]) -> Size:
    """A size by a processor's `size`: both sides, or the shortest one."""
    width, height = size
    if {"width", "height"} <= wanted.keys():
        return wanted["width"], wanted["height"]
    if wanted.keys() == {"shortest_edge"}:
        edge = wanted["shortest_edge"]
        if width <= height:
            return edge, int(edge * height / width)
        return int(edge * width / height), edge
    problem = f"the image processor's size={wanted} is not understood, so boxes have no frame"
    raise ValueError(f"{problem}; choices: height and width, shortest_edge")


def pad_to_square(start: Geometry) -> Geometry:
    """Bands on both sides of the shorter axis, the odd pixel at the end (LLaVA-1.5)."""
    width, height = start.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return start.pad(left, top, side - width - left, side - height - top)


def pixel_budget(width: int, height: int, step: int, shortest_edge: int, longest_edge: int) -> Size:
    """Sides as multiples of `step`, scaled into the bounds where they break one (Qwen2-VL, arXiv 2409.12191, 2.1)."""
    across, down = round(width / step), round(height / step)
    if across * down * step**2 > longest_edge:
        shrink = math.sqrt(width * height / longest_edge)
        across, down = (max(1, math.floor(side / shrink / step)) for side in (width, height))
    elif across * down * step**2 < shortest_edge:
        grow = math.sqrt(shortest_edge / (width * height))
        across, down = (math.ceil(side * grow / step) for side in (width, height))
    return across * step, down * step
