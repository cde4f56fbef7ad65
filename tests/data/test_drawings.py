"""The drawings of the CLIP demo: same images everywhere, balanced names, honest labels."""

import numpy as np
import pytest

from data.world.drawings import CATEGORIES, DrawingDataset, category_of, concepts, names


def test_a_image_is_a_function_of_split_index_and_seed():
    one, two = (DrawingDataset("test", "names", num_samples=9)[5] for _ in range(2))
    assert one.id == two.id and np.array_equal(np.asarray(one.image), np.asarray(two.image))
    for other in (
        DrawingDataset("train", "names", num_samples=9)[5],
        DrawingDataset("test", "names", num_samples=9, seed=1)[5],
    ):
        assert other.answers == one.answers
        assert not np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_shots_are_balanced_over_the_names():
    data = DrawingDataset("train", "names", num_samples=2 * len(names()), style="line")
    shown = [data.choices[index % len(names())] for index in (0, 7, len(names()) + 7)]
    assert [data[index].answers[0] for index in (0, 7, len(names()) + 7)] == shown
    assert data[7].question == "a line drawing of {}" and data[7].tags == ("line",)


def test_names_belong_to_one_category_each():
    every = [name for category in CATEGORIES for name in concepts()[category]]
    assert len(every) == len(set(every)) == len(names()) > 400
    assert category_of("cat") == "animal" and len(concepts()["animal"]["cat"]) == 2  # and its face
    kind = DrawingDataset("train", "kinds", num_samples=3)[0]
    assert kind.answers == ("animal",) and kind.choices == tuple(CATEGORIES)


def test_a_negative_is_its_drawing_with_every_colour_turned_round():
    plain, negative = (
        DrawingDataset("test", "names", num_samples=1, style=style)[0].image for style in ("color", "negative")
    )
    assert np.array_equal(255 - np.asarray(plain), np.asarray(negative))


def test_pairs_name_left_before_right_and_offer_no_choices():
    sample = DrawingDataset("test", "pairs", num_samples=1)[0]
    left, right = sample.answers[0].split(" left of ")
    assert left != right and {left, right} <= set(names()) and sample.choices == ()


def test_wrong_settings_name_the_choices():
    with pytest.raises(ValueError, match="task 'what' is unknown; choices: names, kinds, pairs"):
        DrawingDataset("test", "what", num_samples=1)
    with pytest.raises(ValueError, match="style 'oil' is unknown; choices: color, line, flat"):
        DrawingDataset("test", "names", num_samples=1, style="oil")


def test_a_turned_drawing_is_its_drawing_upside_down():
    plain, turned = (DrawingDataset("test", "names", num_samples=3, style=style)[2] for style in ("color", "turned"))
    pixels = np.asarray(plain.image)[::-1, ::-1]
    assert np.array_equal(np.asarray(turned.image), pixels)
    assert turned.question == "an upside-down drawing of {}"
