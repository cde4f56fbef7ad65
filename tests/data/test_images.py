"""Every kind of image file against its 8-bit RGB computed by hand, and the refusal of all others."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.checks import BadSampleError
from data.images import open_image, to_rgb
from data.ocr import content_hash
from tests.support.tiny import random_image

Pixels = np.ndarray  # [height, width] or [height, width, channel]


def stored(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(content: bytes) -> Pixels:
    return np.asarray(open_image(content, "row 1")).astype(int)


def rgb(greys: Pixels) -> Pixels:
    return np.stack([greys] * 3, axis=-1).astype(int)


def on_white(colors: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def png(depth: int, kind: int, rows: list[bytes], width: int, clear: bytes = b"") -> bytes:
    """A PNG by the specification: `kind` 0 is grey and 2 RGB, `clear` the transparent value."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", clear) if clear else b""]
    return b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def packed(row: Pixels, depth: int) -> bytes:
    """Samples of some bits, the first in the highest bits, padded to whole bytes."""
    bits = "".join(f"{int(value):0{depth}b}" for value in row.ravel())
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


# A kind of image is a function from random numbers in 0..2**32-1 to a file and its right pixels.
def grey_png(depth: int) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    def make(numbers: Pixels) -> tuple[bytes, Pixels]:
        values = numbers >> (32 - depth)
        right = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
        clear = int(values[0, 0])
        content = png(depth, 0, [packed(r, depth) for r in values], values.shape[1],
                      struct.pack(">H", clear))  # fmt: skip
        return content, on_white(rgb(right), np.where(values == clear, 0, 255))

    return make


def deep_rgb_png(numbers: Pixels) -> tuple[bytes, Pixels]:
    values = np.stack([numbers >> 16, numbers & 0xFFFF, (numbers >> 8) & 0xFFFF], axis=-1)
    clear = values[0, 0]
    content = png(16, 2, [packed(r, 16) for r in values], values.shape[1], struct.pack(">3H", *clear))
    # PIL drops the low bytes, so every pixel of the same high bytes is transparent
    return content, on_white(values >> 8, np.where((values >> 8 == clear >> 8).all(-1), 0, 255))


def deep_tiff(order: str) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    def make(numbers: Pixels) -> tuple[bytes, Pixels]:
        values = numbers >> 16
        image = Image.fromarray(values.astype(f"{order}u2"))
        assert image.mode == ("I;16B" if order == ">" else "I;16")
        return stored(image, "TIFF"), rgb(values >> 8)

    return make


def white_is_zero_tiff(numbers: Pixels) -> tuple[bytes, Pixels]:
    values = numbers >> 16
    content = stored(Image.fromarray(values.astype("<u2")), "TIFF", tiffinfo={262: 0})
    return content, rgb(255 - (values >> 8))


def integers_tiff(bits: int) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    def make(numbers: Pixels) -> tuple[bytes, Pixels]:
        values = numbers >> (32 - bits)
        values[0, 0] = 2**bits - 1  # the range shows by its values
        return stored(Image.fromarray(values.astype(np.int32)), "TIFF"), rgb(values >> (bits - 8))

    return make


def floats_tiff(top: float) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    def make(numbers: Pixels) -> tuple[bytes, Pixels]:
        greys = numbers >> 24
        greys[0, 0] = 255
        return stored(Image.fromarray((greys / 255 * top).astype(np.float32)), "TIFF"), rgb(greys)

    return make


def pgm(numbers: Pixels) -> tuple[bytes, Pixels]:
    values = numbers >> 20
    head = f"P5 {values.shape[1]} {values.shape[0]} 4095\n".encode()
    return head + values.astype(">u2").tobytes(), rgb(np.rint(values / 4095 * 65535).astype(int) >> 8)


def with_alpha(mode: str, kind: str) -> Callable[[Pixels], tuple[bytes, Pixels]]:
    def make(numbers: Pixels) -> tuple[bytes, Pixels]:
        channels = [(numbers >> shift) & 255 for shift in (0, 8, 16)]
        alpha = np.where(numbers >> 31, 255, (numbers >> 24) & 255)
        if mode == "LA":
            channels = [channels[0]] * 3
        seen = [channels[0]] if mode == "LA" else channels
        image = Image.fromarray(np.stack([*seen, alpha], axis=-1).astype(np.uint8), mode)
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        return stored(image, kind, **options), on_white(np.stack(channels, axis=-1), alpha)

    return make


def palette(numbers: Pixels) -> tuple[bytes, Pixels]:
    """Four colours, of which one is clear and one half clear."""
    colors = np.array([[255, 0, 0], [0, 0, 0], [0, 200, 0], [9, 8, 7]])
    alphas = np.array([255, 0, 128, 255])
    places = numbers & 3
    image = Image.fromarray(places.astype(np.uint8), "P")
    image.putpalette(colors.astype(np.uint8).tobytes())
    content = stored(image, "PNG", transparency=bytes(alphas.tolist()))
    return content, on_white(colors[places], alphas[places])


def gif(numbers: Pixels) -> tuple[bytes, Pixels]:
    """Two frames, of which the first counts; index 1 is clear."""
    colors = np.array([[255, 0, 0], [0, 0, 0], [0, 200, 0], [9, 8, 7]])
    places = (numbers & 3).astype(np.uint8)
    frames = [Image.fromarray(p, "P") for p in (places, 3 - places)]
    for frame in frames:
        frame.putpalette(colors.astype(np.uint8).tobytes())
    content = stored(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=1)
    return content, on_white(colors[places], np.where(places == 1, 0, 255))


def turned(numbers: Pixels) -> tuple[bytes, Pixels]:
    """EXIF says that the camera was turned; the pixels stay as they are stored."""
    values = np.stack([numbers & 255] * 3, axis=-1)
    exif = Image.Exif()
    exif[274] = 6
    return stored(Image.fromarray(values.astype(np.uint8)), "PNG", exif=exif), values


KINDS = {
    "PNG of 1 bit": grey_png(1), "PNG of 2 bits": grey_png(2), "PNG of 4 bits": grey_png(4),
    "PNG of 8 bits": grey_png(8), "PNG of 16 bits": grey_png(16), "RGB PNG of 16": deep_rgb_png,
    "TIFF of 16 bits": deep_tiff("<"), "big-endian TIFF": deep_tiff(">"),
    "TIFF whose 0 is white": white_is_zero_tiff, "32-bit TIFF in 8": integers_tiff(8),
    "32-bit TIFF in 16": integers_tiff(16), "float TIFF to 1": floats_tiff(1.0),
    "float TIFF to 255": floats_tiff(255.0), "PGM of 12 bits": pgm,
    "RGBA PNG": with_alpha("RGBA", "PNG"), "RGBA TIFF": with_alpha("RGBA", "TIFF"),
    "RGBA WebP": with_alpha("RGBA", "WEBP"), "LA PNG": with_alpha("LA", "PNG"),
    "palette": palette, "animated GIF": gif, "EXIF": turned,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 2**32 - 1), min_size=width, max_size=width),
            min_size=1,
            max_size=6,
        )
    )
)
def test_an_image_becomes_the_8_bit_pixels_computed_by_hand(kind, numbers):
    content, right = KINDS[kind](np.array(numbers, dtype=np.int64))
    found = opened(content)
    assert found.shape == right.shape
    assert np.abs(found - right).max() <= 1  # blending is rounded


def test_an_even_ramp_of_16_bits_keeps_256_levels_and_a_drawing_on_nothing_its_ink():
    ramp = Image.fromarray((np.arange(256, dtype=np.uint16) * 257)[None])
    assert opened(stored(ramp, "PNG"))[0, :, 0].tolist() == list(range(256))
    drawing = Image.new("RGBA", (3, 1))
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    assert opened(stored(drawing, "PNG"))[0, :, 0].tolist() == [255, 0, 255]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 70000]], np.int32),
        np.array([[-1, 9]], np.int32),
        np.array([[0, 256]], np.float32),
        np.array([[-0.5, 1]], np.float32),
        np.array([[np.nan, 1]], np.float32),
        np.array([[np.inf, 1]], np.float32),
    ],
)
def test_greys_whose_range_is_unknown_are_refused_with_a_way_out(values):
    with pytest.raises(BadSampleError, match="row 1: broken image: .* save the image with 8 or 16"):
        opened(stored(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La",
                                  "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B", "F"])  # fmt: skip
def test_pixels_that_are_decoded_already_are_read_in_every_mode(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_the_hash_of_an_image_without_transparency_is_that_of_its_rgb_bytes():
    image = random_image(1)
    assert content_hash(image) == content_hash(image.convert("RGBA"))
    clear = Image.new("RGBA", (2, 2))
    assert content_hash(clear) == content_hash(Image.new("RGB", (2, 2), "white"))


def test_an_image_of_too_many_pixels_is_refused_by_its_size_before_it_is_decoded():
    content = png(1, 0, [b"\0" * 1250], 10_000)  # its one row is missing the others
    content = content.replace(struct.pack(">II", 10_000, 1), struct.pack(">II", 10_000, 10_000), 1)
    crc = struct.pack(">I", zlib.crc32(content[12:29]))
    content = content[:29] + crc + content[33:]
    with pytest.raises(BadSampleError, match="image too large: .*10000x10000 pixels; at most 89,"):
        opened(content)
