"""Boxes as text: known tokens, round trips to half a step, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.boxes import CODECS, decode_locations, encode_locations

CODEC = CODECS["location_tokens"]


def test_tokens_come_in_the_order_top_left_bottom_right():
    text = encode_locations((10, 0, 30, 20), 31, 31)
    assert text == "<loc0000><loc0010><loc0020><loc0030>"


def test_the_whole_picture_is_exact():
    text = CODEC.encode((0, 0, 640, 480), 640, 480)
    assert text == "<loc0000><loc0000><loc0031><loc0031>"
    assert CODEC.decode(text, 640, 480) == (0, 0, 640, 480)


coordinate = st.floats(0, 1)


@given(x=st.tuples(coordinate, coordinate), y=st.tuples(coordinate, coordinate))
def test_a_box_comes_back_within_a_step_and_is_always_readable(x, y):
    width, height = 200, 120
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    if box[0] >= box[2] or box[1] >= box[3]:
        return
    back = CODEC.decode(CODEC.encode(box, width, height), width, height)
    assert back is not None
    for got, wanted, side in zip(back, box, (width, height) * 2, strict=True):
        thin = min(x1 - x0, y1 - y0) < 1 / 31
        assert abs(got - wanted) <= side / 31 * (1.0 if thin else 0.5) + 1e-6


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 11), (5, 0, 5, 5), (0, 6, 5, 5)]
)
def test_a_box_outside_its_picture_or_without_area_is_refused(box):
    with pytest.raises(ValueError, match="10x10 pixels"):
        CODEC.encode(box, 10, 10)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "<loc0001><loc0002><loc0003>",
        "<loc0001> or <loc0002><loc0003><loc0004>",
        "<loc0009><loc0001><loc0003><loc0004>",  # upside down
        "<loc0000><loc0000><loc0031><loc0032>",  # past the last bin
    ],
)
def test_text_without_a_box_decodes_to_none(text):
    assert decode_locations(text, 10, 10) is None


def test_a_box_is_found_inside_other_text_and_across_spaces():
    text = "it is at <loc0000> <loc0000> <loc0031> <loc0031>."
    assert decode_locations(text, 10, 20) == (0, 0, 10, 20)
