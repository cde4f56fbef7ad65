"""Boxes as text: the authors' forms, round trips to half a step through any geometry, refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.boxes import CODECS, location_tokens
from data.geometry import pad_to_square, whole

CODEC = CODECS["location_tokens"]


def test_tokens_come_in_the_order_top_left_bottom_right():
    text = CODEC.encode([(10, 0, 30, 20)], whole(31, 31))
    assert text == "<loc0000><loc0010><loc0020><loc0030>"


def test_the_whole_image_is_exact():
    text = CODEC.encode([(0, 0, 640, 480)], whole(640, 480))
    assert text == "<loc0000><loc0000><loc0031><loc0031>"
    assert CODEC.decode(text, whole(640, 480)) == (0, 0, 640, 480)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("paligemma", "<loc0512><loc0256><loc1023><loc0512>"),
        ("llava", "[0.25, 0.50, 0.50, 1.00]"),
        ("shikra", "[0.250,0.500,0.500,1.000]"),
        ("qwen_vl", "<box>(250,500),(500,1000)</box>"),
        ("qwen2_vl", "<|box_start|>(250,500),(500,1000)<|box_end|>"),
        ("qwen2_5_vl", '[{"bbox_2d": [200, 200, 400, 400]}]'),
        ("qwen3_vl", '[{"bbox_2d": [250, 500, 500, 1000]}]'),
        ("internvl", "<box>[[250, 500, 500, 1000]]</box>"),
    ],
)
def test_each_convention_writes_as_its_authors_do(name, text):
    assert CODECS[name].encode([(200, 200, 400, 400)], whole(800, 400)) == text


def test_several_boxes_stand_as_the_convention_joins_them():
    boxes = [(0, 0, 50, 100), (50, 0, 100, 100)]
    assert CODECS["shikra"].encode(boxes, whole(100, 100)) == ("[0.000,0.000,0.500,1.000;0.500,0.000,1.000,1.000]")
    assert CODECS["internvl"].encode(boxes, whole(100, 100)) == ("<box>[[0, 0, 500, 1000], [500, 0, 1000, 1000]]</box>")


def test_llava_speaks_of_the_square_that_the_processor_pads_to():
    frame = pad_to_square(whole(200, 100))  # 50 rows above, 50 below
    text = CODECS["llava"].encode([(0, 0, 200, 100)], frame)
    assert text == "[0.00, 0.25, 1.00, 0.75]"
    assert CODECS["llava"].decode(text, frame) == (0, 0, 200, 100)


def test_qwen_2_5_speaks_of_the_pixels_after_resizing():
    frame = whole(200, 100).resize(56, 28)
    text = CODECS["qwen2_5_vl"].encode([(50, 25, 100, 100)], frame)
    assert text == '[{"bbox_2d": [14, 7, 28, 28]}]'


def test_a_cropped_box_is_written_as_what_is_left_of_it():
    frame = whole(200, 100).crop(50, 0, 100, 100)
    text = CODECS["llava"].encode([(0, 0, 100, 100)], frame)
    assert text == "[0.00, 0.00, 0.50, 1.00]"
    assert CODECS["llava"].decode(text, frame) == (50, 0, 100, 100)
    with pytest.raises(ValueError, match="what the model sees"):
        CODECS["llava"].encode([(0, 0, 50, 100)], frame)


share = st.floats(0, 1)
GEOMETRIES = {
    "whole": lambda start: start,
    "pad": pad_to_square,
    "resize": lambda start: start.resize(336, 448),
    "crop": lambda start: start.crop(20, 10, 150, 90),
    "all": lambda start: pad_to_square(start.crop(20, 10, 150, 90)).resize(448, 224),
}


@pytest.mark.parametrize("name", CODECS)
@given(x=st.tuples(share, share), y=st.tuples(share, share), way=st.sampled_from([*GEOMETRIES]))
def test_a_box_comes_back_within_half_a_step_and_is_always_readable(name, x, y, way):
    codec, frame = CODECS[name], GEOMETRIES[way](whole(200, 120))
    left, top, right, bottom = frame.seen
    (x0, x1), (y0, y1) = sorted(x), sorted(y)
    box = (
        left + x0 * (right - left), top + y0 * (bottom - top),
        left + x1 * (right - left), top + y1 * (bottom - top),
    )  # fmt: skip
    if box[0] >= box[2] or box[1] >= box[3]:
        return
    back = codec.decode(codec.encode([box], frame), frame)
    assert back is not None
    for axis in (0, 1):
        step = frame.size[axis] / codec.steps(frame.size[axis]) / frame.scale[axis]
        thin = box[axis + 2] - box[axis] <= step
        for got, wanted in ((back[axis], box[axis]), (back[axis + 2], box[axis + 2])):
            assert abs(got - wanted) <= step * (1.0 if thin else 0.5) + 1e-6


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 11), (5, 0, 5, 5), (0, 6, 5, 5)])
def test_a_box_outside_its_image_or_without_area_is_refused(box):
    with pytest.raises(ValueError, match="10x10 pixels"):
        CODEC.encode([box], whole(10, 10))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("location_tokens", ""),
        ("location_tokens", "a cat"),
        ("location_tokens", "<loc0001><loc0002><loc0003>"),
        ("location_tokens", "<loc0001> or <loc0002><loc0003><loc0004>"),
        ("location_tokens", "<loc0009><loc0001><loc0003><loc0004>"),  # upside down
        ("location_tokens", "<loc0000><loc0000><loc0031><loc0032>"),  # past the last bin
        ("llava", "[0.1, 0.2, 0.3]"),
        ("llava", "[0.5, 0.2, 0.3, 0.9]"),  # right to left
        ("llava", "[1.2, 0.2, 1.4, 0.9]"),  # outside
        ("qwen2_vl", "(1,2) (3,4)"),
        ("qwen2_5_vl", '[{"bbox_2d": ["a", 1, 2, 3]}]'),
    ],
)
def test_text_without_a_box_decodes_to_none(name, text):
    assert CODECS[name].decode(text, whole(10, 10)) is None


def test_a_box_is_found_inside_other_text_and_across_spaces():
    text = "it is at <loc0000> <loc0000> <loc0031> <loc0031>."
    assert CODEC.decode(text, whole(10, 20)) == (0, 0, 10, 20)
    assert CODECS["llava"].decode("Sure: [0,0.5,1,1].", whole(10, 20)) == (0, 10, 10, 20)


@pytest.mark.parametrize("name", CODECS)
def test_all_boxes_of_an_answer_are_found_in_their_order_and_those_without_area_left_out(name):
    codec, frame = CODECS[name], whole(100, 100)
    two = codec.encode([(0, 0, 50, 50), (50, 50, 100, 100)], frame)
    first, second = codec.decode_all(two, frame)
    assert first == codec.decode(two, frame) and second[0] > first[0] and codec.decode_all("none", frame) == ()


def test_an_answer_that_overshoots_the_frame_is_cut_at_it():
    answer = '```json\n[{"bbox_2d": [5, -1, 12, 8], "label": "cat"}]\n```'
    assert CODECS["qwen2_5_vl"].decode(answer, whole(10, 20)) == (5, 0, 10, 8)


def test_special_tokens_may_be_gone_from_the_answer():
    assert CODECS["qwen2_vl"].decode("(0,0),(500,1000)", whole(10, 20)) == (0, 0, 5, 20)


def test_the_number_of_location_tokens_is_a_parameter():
    assert location_tokens(3).encode([(0, 0, 4, 8)], whole(8, 8)) == ("<loc0000><loc0000><loc0002><loc0001>")
