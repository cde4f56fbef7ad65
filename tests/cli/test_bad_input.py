"""Bad input: one clear error that names file, row or key, the rule, and the choices."""

import json
from dataclasses import replace

import pytest

from data.checks import BadSampleError
from data.config import SourceConfig
from data.readers.table import open_records
from data.sample import Turn
from tests.data.test_collate import COLLATE, sample
from tests.support.tiny import random_image
from tests.support.toy import write_rows

GOOD = {"image": "a.png", "task": "vqa", "question": "what is it?", "answers": ["a cat"]}


def jsonl(path):
    return open_records(SourceConfig(name="mine", format="jsonl", path=str(path)), None)


@pytest.fixture
def rows(tmp_path):
    """Writes two good rows around the given one, and returns the data set."""
    random_image(0).save(tmp_path / "a.png")  # 40 x 30 pixels

    def dataset(row):
        path = write_rows(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
        return jsonl(path)

    return dataset


def error_of(dataset) -> BadSampleError:
    assert dataset[0].answers == dataset[2].answers == ("a cat",)  # its neighbours are untouched
    with pytest.raises(BadSampleError) as error:
        dataset[1]
    return error.value


def test_a_row_becomes_a_typed_sample(rows):
    row = {**GOOD, "boxes": [[1, 2, 3, 4]], "ocr": [{"text": "hi", "box": [0, 0, 5, 5]}], "id": 5}
    read = rows(row)[1]
    assert (read.id, read.task, read.source, read.image.size) == ("5", "vqa", "mine", (40, 30))
    assert read.boxes == ((1.0, 2.0, 3.0, 4.0),) and read.ocr[0].text == "hi"
    assert rows(GOOD)[1].ocr is None


def test_a_missing_image_is_named_with_its_row(rows):
    error = error_of(rows({**GOOD, "image": "nowhere.png"}))
    assert error.rule == "missing image"
    assert "rows.jsonl:2" in str(error) and "nowhere.png" in str(error)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_named_with_its_row(rows, tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    random_image(1, 200, 200).save(whole)
    (tmp_path / f"half.{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    error = error_of(rows({**GOOD, "image": f"half.{suffix}"}))
    assert error.rule == "broken image" and "rows.jsonl:2" in str(error)


def test_a_file_that_is_no_image_is_named_with_its_row(rows, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    assert error_of(rows({**GOOD, "image": "text.png"})).rule == "broken image"


@pytest.mark.parametrize("box", [[0, 0, 41, 10], [-1, 0, 5, 5], [9, 9, 3, 12]])
def test_a_box_outside_its_picture_is_named_with_its_row(rows, box):
    error = error_of(rows({**GOOD, "boxes": [box]}))
    assert error.rule == "box outside image"
    assert "rows.jsonl:2" in str(error) and "40x30" in str(error)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"image": "a.png", "question": "?"}, "lacks task"),
        ({**GOOD, "anwsers": ["x"]}, "unknown key ['anwsers']"),
        ({**GOOD, "boxes": [[1, 2, 3]]}, "a box is four numbers, got [1, 2, 3]"),
        ({**GOOD, "ocr": [{"text": "x"}]}, "box"),
        ([1, 2], "a row is one object a line, got list"),
    ],
)
def test_a_row_of_another_shape_is_named_with_what_is_wrong(rows, row, detail):
    error = error_of(rows(row))
    assert error.rule == "unreadable row" and detail in str(error) and "rows.jsonl:2" in str(error)


def test_a_line_that_is_no_json_is_named(tmp_path):
    random_image(0).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{'image': 1}\n")
    with pytest.raises(BadSampleError, match=r"rows\.jsonl:2: unreadable row: not JSON"):
        jsonl(path)[1]


def test_a_data_file_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\.mine: .*no\.jsonl: no such data file"):
        jsonl(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        jsonl(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("changes", "rule", "detail"),
    [
        ({"answers": ()}, "empty answer", "no box"),
        ({"answers": ("", " ")}, "empty answer", "no box"),
        ({"question": " "}, "empty question", ""),
        ({"turns": (Turn(question="and?", answer=" "),)}, "empty answer", "turn 2"),
        ({"turns": (Turn(question=" ", answer="b"),)}, "empty question", "turn 2"),
        ({"task": "cook"}, "unknown task", "choices: ['vqa', 'grounding']"),
        ({"expert": "cook"}, "unknown expert", "choices: ['one', 'two']"),
        ({"boxes": ((0, 0, 99, 5),)}, "box outside image", "40x30"),
        ({"question": "is <image> a picture?"}, "image token in text", "rename"),
        ({"answers": ("an <image>",)}, "image token in text", "rename"),
    ],
)
def test_collation_names_the_sample_and_the_rule(changes, rule, detail):
    with pytest.raises(BadSampleError) as error:
        COLLATE([sample(), sample(**changes)])
    assert error.value.rule == rule
    assert "source 'toy', sample 7" in str(error.value) and detail in str(error.value)


def test_a_sample_to_be_answered_needs_no_answer_of_its_own():
    assert len(replace(COLLATE, for_generation=True)([sample(answers=())])) == 1
