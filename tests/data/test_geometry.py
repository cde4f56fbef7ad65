"""Pixels and boxes take the same way to the model; the real image processors are the reference."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil, SiglipImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data.geometry import Geometry, pixel_budget, resized, seen_by, whole

RED = (255, 0, 0)
CROP = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
PROCESSORS = {
    "clip crops": CROP,
    "clip crops in a larger frame": CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 57, "width": 61}
    ),
    "llava pads": LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    ),
    "siglip squeezes": SiglipImageProcessorPil(size={"height": 56, "width": 56}),
    "qwen rounds": Qwen2VLImageProcessorPil(size={"shortest_edge": 28**2, "longest_edge": 112**2}),
}


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste(RED, box)
    return image


def red_bounds(pixels: np.ndarray) -> np.ndarray:
    """x0 y0 x1 y1 around the red pixels of [height, width, 3] in 0..255."""
    rows, columns = np.where(pixels[..., 0] - pixels[..., 2] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def processed(processor, image: Image.Image) -> np.ndarray:
    """What the processor hands to the model, as [height, width, 3] in 0..255."""
    out = processor(image, return_tensors="np")
    pixels = out["pixel_values"]
    if "image_grid_thw" in out:  # patches of 2 x 2 groups, each [3, time, 14, 14]
        _, rows, columns = out["image_grid_thw"][0]
        grid = pixels.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
        pixels = grid.transpose(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 14, columns * 14)
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    return (pixels[0].transpose(1, 2, 0) * std + mean) * 255


@pytest.mark.parametrize("size", [(90, 60), (61, 100), (80, 80)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_box_lands_where_the_processor_puts_its_pixels(name, size):
    processor, box = PROCESSORS[name], (30, 25, 50, 45)
    geometry = seen_by(processor, *size)
    image = painted(*size, box)
    pixels = processed(processor, image)
    assert (pixels.shape[1], pixels.shape[0]) == geometry.size
    assert geometry.hidden(box) == pytest.approx(0)
    assert abs(red_bounds(pixels) - geometry.to_frame(box)).max() <= 1
    fill = processor.image_mean if name == "llava pads" else (0, 0, 0)
    colour = tuple(int(255 * value) for value in fill)
    drawn = np.asarray(geometry.pixels(image, colour), dtype=float)
    assert abs(red_bounds(drawn) - red_bounds(pixels)).max() <= 1
    assert np.quantile(abs(drawn - pixels), 0.9) < 3  # edges differ by their interpolation


def test_a_centre_crop_hides_what_lies_outside_its_window():
    geometry = seen_by(CROP, 200, 100)  # resized to 112 x 56, of which 56 in the middle are left
    assert geometry.seen == pytest.approx((50, 0, 150, 100))
    assert geometry.hidden((0, 0, 50, 100)) == pytest.approx(1)
    assert geometry.hidden((40, 10, 60, 20)) == pytest.approx(0.5)
    assert geometry.hidden((50, 0, 150, 100)) == pytest.approx(0)


def test_padding_after_a_crop_does_not_bring_the_cropped_part_back():
    geometry = whole(100, 100).crop(50, 0, 50, 100).pad(50, 0, 0, 0)
    assert geometry.size == (100, 100)
    assert geometry.hidden((0, 0, 50, 100)) == 1
    red = painted(100, 100, (0, 0, 50, 100))
    assert not (np.asarray(geometry.pixels(red)) == RED).all(-1).any()


def test_tiles_show_the_whole_image():
    class Tiling:
        image_grid_pinpoints = [[336, 672]]

    assert seen_by(Tiling(), 640, 480) == whole(640, 480)


@pytest.mark.parametrize(
    ("size", "right"),
    [((100, 151), (28, 42)), ((151, 100), (42, 28)), ((100, 199), (28, 55)), ((5, 5), (28, 28))],
)
def test_the_longer_side_is_rounded_down_as_the_processors_do(size, right):
    assert resized(size, {"shortest_edge": 28}) == right


def test_an_unknown_size_is_refused_with_the_choices():
    processor = SiglipImageProcessorPil(size={"longest_edge": 64})
    with pytest.raises(ValueError, match=r"longest_edge.*height and width, shortest_edge"):
        seen_by(processor, 10, 10)


side = st.integers(1, 3000)


@given(side, side, st.sampled_from([28, 32]), st.integers(1, 900), st.integers(901, 20000))
def test_the_pixel_budget_is_qwens(width, height, step, low, high):
    assume(max(width, height) <= 200 * min(width, height))
    low, high = low * step, high * step
    wanted = smart_resize(height, width, step, low, high)
    assert pixel_budget(width, height, step, low, high) == wanted[::-1]


step = st.one_of(
    st.tuples(st.just("resize"), st.integers(1, 500), st.integers(1, 500)),
    st.tuples(st.just("crop"), *[st.integers(-50, 50)] * 2, *[st.integers(1, 300)] * 2),
    st.tuples(st.just("pad"), *[st.integers(0, 80)] * 4),
)
steps = st.lists(step, max_size=4)


def chain(start: Geometry, found: list[tuple]) -> Geometry:
    for name, *arguments in found:
        start = getattr(start, name)(*arguments)
    return start


@given(side, side, steps, st.lists(st.floats(-100, 3000), min_size=4, max_size=4))
def test_the_inverse_undoes_every_composition(width, height, found, box):
    geometry = chain(whole(width, height), found)
    # a resize to one pixel and back loses digits in proportion to the scale
    assert geometry.to_source(geometry.to_frame(tuple(box))) == pytest.approx(tuple(box), abs=1e-4)


@given(side, side, steps, steps)
def test_composition_is_the_same_in_one_go_and_in_two(width, height, first, second):
    before = chain(whole(width, height), first)
    after = chain(whole(*before.size), second)
    once, twice = before.then(after), chain(before, second)
    assert once.size == twice.size
    for name in ("scale", "offset", "seen"):
        assert getattr(once, name) == pytest.approx(getattr(twice, name), rel=1e-6, abs=1e-4)
