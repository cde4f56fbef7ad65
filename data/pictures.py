"""Picture files from outside: found inside their folder, opened whole, refused where broken."""

import io
import os
import re
from pathlib import Path

from PIL import Image

from data.checks import BadSampleError

Picture = Path | bytes | Image.Image  # a file, the bytes of one, or pixels that are there already


def find_picture(folder: str | Path, *names: str) -> Path:
    """The first of `names` that is a file below `folder`, or where the first would have been.

    A name may hold folders but not lead out of `folder` (links inside it are the user's own, and
    followed). Raises BadSampleError for a name that does.
    """
    paths = []
    for name in names:
        inside = os.path.normpath(name)
        if os.path.isabs(name) or inside.split(os.sep)[0] == os.pardir or "\0" in name:
            raise BadSampleError(str(folder), "picture outside folder", repr(name))
        paths.append(Path(folder) / inside)
    return next((path for path in paths if path.is_file()), paths[0])


def coco_number(image: str) -> str:
    """A picture's number in COCO, which is its id in every data set made of it, or else its name."""
    found = re.search(r"(?:^|[/_])(\d{12})\.jpg$", image)
    return str(int(found[1])) if found else image


def named_picture(name: str, folder: str | None) -> Path:
    """A picture that a row names, in the folder that the config should name."""
    if folder is None:
        raise ValueError(f"names a picture, {name!r}; set the source's `images`, its folder")
    return find_picture(folder, name)


def open_picture(picture: Picture, where: str) -> Image.Image:
    """The whole picture as RGB, as it is stored (no turning by EXIF): boxes count its pixels.

    PIL reads lazily, and a truncated file shows only when it is converted.
    """
    if isinstance(picture, Path) and not picture.is_file():
        raise BadSampleError(where, "missing image", str(picture))
    name = str(picture) if isinstance(picture, Path) else "picture in the file"
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise BadSampleError(where, "picture too large", f"{name}: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three for broken files
        raise BadSampleError(where, "broken image", f"{name}: {error}") from None
