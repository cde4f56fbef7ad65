"""The frame of words around an image: what is in it, and where boxes go."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data.border import border_of, bordered, draw_border, number_on_colour, words_in_a_row
from data.boxes import CODECS
from data.collate import ChatCollator
from data.config import PromptConfig, SourceConfig
from data.prompt import Prompt
from data.readers.table import open_records
from data.sample import OcrWord, Sample
from tests.support.tiny import random_image, tiny_processor


def test_the_image_is_in_the_middle_and_boxes_move_with_it():
    image = random_image(0).resize((50, 30))
    framed, geometry = draw_border(image, 0.2, "where is the cat?", 2), bordered(50, 30, 0.2)
    assert border_of((50, 30), 0.2) == 10 and framed.size == geometry.size == (70, 50)
    assert np.array_equal(framed.crop((10, 10, 60, 40)), image)
    assert geometry.to_frame((5, 6, 20, 30)) == (15, 16, 30, 40)
    assert geometry.to_source((15, 16, 30, 40)) == (5, 6, 20, 30)


def test_corners_say_the_task_and_sides_the_question():
    image = Image.new("RGB", (90, 60), "white")
    one, other = (np.asarray(draw_border(image, 0.15, "what is this?", task)) for task in (0, 1))
    none = np.asarray(draw_border(image, 0.15, "what is this?", -1))
    corner, middle = np.s_[:14, :14], np.s_[:14, 14:-14]
    assert not np.array_equal(one[corner], other[corner]) and np.array_equal(one[middle], other[middle])
    assert np.array_equal(one[corner], one[-14:, -14:])
    assert (none[corner].max(-1) == none[corner].min(-1)).all()  # grey
    asked = np.asarray(draw_border(image, 0.15, "how many?", 0))
    for side in (middle, np.s_[-14:, 14:-14], np.s_[14:-14, :14], np.s_[14:-14, -14:]):
        assert not np.array_equal(one[side], asked[side])
    assert (np.asarray(draw_border(image, 0.15, "", 0))[middle] == 255).all()


def test_letters_of_a_long_question_are_smaller_and_all_of_them_are_there():
    text, length = "one two three four five six seven eight nine ten", 120
    row = words_in_a_row(text, length, 20)
    assert row.size == (length, 20)
    columns = np.flatnonzero((np.asarray(row.convert("L")) < 128).any(0))
    assert columns.max() < length and columns.max() > length / 2


@pytest.mark.slow
def test_a_batch_has_the_frame_in_pixels_words_boxes_and_targets():
    processor, codec = tiny_processor(), CODECS["llava"]
    word = OcrWord(text="sign", box=(0.0, 0.0, 20.0, 15.0), confidence=0.9)
    made = {"answers": (), "boxes": ((10.0, 5.0, 30.0, 25.0),), "ocr": (word,), "image": random_image(1)}
    sample = Sample(id="1", image_id="1", question="where?", task="grounding", source="s", **made)
    options = {"processor": processor, "tasks": ["vqa", "grounding"], "experts": [], "codec": codec}
    plain = ChatCollator(**options, settings=PromptConfig())
    framed = ChatCollator(**options, settings=PromptConfig(border=0.25))
    width, height = sample.size
    side = border_of(sample.size, 0.25)
    assert (
        framed.images(sample)[0].size == (width + 2 * side, height + 2 * side)
        and plain.images(sample)[0] is sample.image
    )
    before, after = plain([sample]), framed([sample])
    assert not before.pixel_values.equal(after.pixel_values)
    (x0, y0, x1, y1), frame = after.ocr_boxes[0, 0].tolist(), framed.images(sample)[0].size
    expected = [side / frame[0], side / frame[1], (side + 20) / frame[0], (side + 15) / frame[1]]
    assert [x0, y0, x1, y1] == pytest.approx(expected)
    assert framed.target(sample) != plain.target(sample)
    found = codec.decode(framed.target(sample), framed.geometry(sample))
    assert found == pytest.approx(sample.boxes[0], abs=0.03 * max(frame))


def test_classes_are_asked_for_as_a_task_with_a_number_of_its_own_and_not_by_a_template(tmp_path):
    for number, name in enumerate(("cat", "red fox")):
        (tmp_path / name).mkdir()
        random_image(number).save(tmp_path / name / "1.png")
    plain = SourceConfig(format="image_folder", path=str(tmp_path))
    asked = [*open_records(replace(plain, prompt="what is this?"), None, None)]
    tasks = ["vqa", "classification", "grounding"]
    prompt = Prompt(processor=tiny_processor(), tasks=tasks, experts=[], settings=PromptConfig(border=0.2))
    assert [prompt.error_of(sample) for sample in asked] == [None, None]
    assert [prompt.prompt(sample) for sample in asked] == ["[classification] what is this?"] * 2
    assert [prompt.target(sample) for sample in asked] == ["cat", "red fox"]
    side = border_of(asked[0].size, 0.2)
    assert np.array_equal(np.asarray(prompt.images(asked[0])[0])[:side, :side], number_on_colour(1, side))
    error = str(prompt.error_of(open_records(plain, None, None)[0]))
    assert "template as question: 'a photo of a {}' is a CLIP's template; ask by the source's prompt" in error
