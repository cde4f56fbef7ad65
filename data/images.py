"""Image files from outside: found inside their folder, opened whole as 8-bit RGB, refused where broken.

    file -> size checked -> greys of more bits scaled to 8 -> transparency on white -> RGB

Every format, CLIP's too, and the OCR cache open images through `open_image`.
"""

import io
import os
import re
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from data.checks import BadSampleError

# A file, the bytes of one, or decoded pixels
StoredImage = Path | bytes | Image.Image
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a TIFF tag, and its value in which 0 is white
# Bits of a grey value by PIL's name of the stored form, where its mode does not tell
STORED_BITS = {"I;12": 12, "I;16S": 15, "I;16BS": 15}
# PIL scales these pixels to 8 bits but leaves the value of the transparent one as it is stored
STORED_LEVELS = {"L;2": 3, "L;4": 15, "RGB;16B": 65535}


def find_image(folder: str | Path | None, *names: str) -> Path:
    """The first of `names` that is a file below `folder`, or where the first would have been.

    A name may hold folders but not lead out of `folder` (links inside it are the user's own, and followed); an absolute
    one must lie below it. Raises BadSampleError for a name that leads out, and ValueError without a folder.
    """
    if folder is None:
        raise ValueError(f"names an image, {names[0]!r}; set the source's `images`, its folder")
    paths = []
    for name in names:
        inside = os.path.normpath(name)
        if os.path.isabs(inside):
            inside = os.path.relpath(inside, folder)
        if inside.split(os.sep)[0] == os.pardir or "\0" in name:
            hint = "; `images: /` accepts every absolute name" if os.path.isabs(name) else ""
            raise BadSampleError(str(folder), "image outside folder", f"{name!r}{hint}")
        paths.append(Path(folder) / inside)
    return next((path for path in paths if is_readable(path)), paths[0])


def is_readable(path: Path) -> bool:
    """Whether there is a file; False too for a name that the system refuses, such as one too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_hidden(path: PurePath) -> bool:
    """Whether a part of a relative path is hidden, or what macOS adds to archives."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)


def coco_number(image: str) -> str:
    """An image's number in COCO, which is its id in every data set made of it, or else its name."""
    found = re.search(r"(?:^|[/_])(\d{12})\.jpg$", image)
    return str(int(found[1])) if found else image


def named_image(name: str, folder: str | None) -> Path:
    """An image that a row names, in the folder that the config should name."""
    name = name.removeprefix("file://")
    if "://" in name or name.startswith("data:"):
        raise ValueError(f"names an image by its URL, {name!r:.60}; store it as a file")
    return find_image(folder, name)


def open_image(stored: StoredImage, where: str) -> Image.Image:
    """The whole image as RGB (`to_rgb`), as it is stored (no turning by EXIF): boxes count its pixels.

    PIL reads lazily, and a truncated file shows only when it is converted. An image of more pixels
    than PIL's MAX_IMAGE_PIXELS is refused before it is decoded.
    """
    if isinstance(stored, Path) and not is_readable(stored):
        raise BadSampleError(where, "missing image", str(stored))
    name = str(stored) if isinstance(stored, Path) else "image in the file"
    try:
        if isinstance(stored, Image.Image):
            return to_rgb(stored)
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            check_size(image)
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BadSampleError(where, "image too large", f"{name}: {error}") from None
    except Exception as error:  # the decoders raise errors of any type for broken files
        detail = str(error) or type(error).__name__
        raise BadSampleError(where, "broken image", f"{name}: {detail}") from None


def check_size(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} pixels; at most {limit:,} are read: make it smaller"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, greys scaled by their range, transparency on white; ValueError for an unknown range."""
    stored = stored_form(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bit_greys(image, stored)
    elif stored in STORED_LEVELS and "transparency" in image.info:
        color, levels = np.array(image.info["transparency"]), STORED_LEVELS[stored]
        color = color >> 8 if levels > 255 else color * (255 // levels)
        image.info["transparency"] = tuple(color.tolist()) if color.ndim else int(color)
    if image.mode == "La":  # PIL converts it to LA alone
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def stored_form(image: Image.Image) -> str:
    """PIL's name of how a file stores the pixels; empty once they are decoded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def eight_bit_greys(image: Image.Image, stored: str) -> Image.Image:
    """The mode L, or LA where one value is transparent, of an image of 12, 16, 32 or float bits."""
    sixteen = image.mode.startswith("I;16") or image.format == "PPM"
    bits = STORED_BITS.get(stored, 16 if sixteen else None)
    values = np.asarray(image)
    greys = scaled_greys(values, bits)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        greys = 255 - greys  # PIL turns those of 8 bits alone
    scaled, clear = Image.fromarray(greys), image.info.get("transparency")
    if clear is not None:
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return scaled


def scaled_greys(values: np.ndarray, bits: int | None) -> np.ndarray:
    """Greys in 8 bits; without `bits` from the smallest usual range: 255 or 65535 of integers, 1 or 255 of floats."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        inside, scaled = high <= 255, np.rint(values * 255 if high <= 1 else values)
    else:
        bits = bits or (8 if high <= 255 else 16)
        inside, scaled = high < 2**bits, values >> (bits - 8)
    if not (low >= 0 and inside):  # also for NaN
        raise ValueError(f"grey values from {low} to {high} have no known range; save the image with 8 or 16 bits")
    return scaled.astype(np.uint8)
