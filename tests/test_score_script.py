"""Answers from files: matched by id, scored as eval.py scores, and what is wrong with them said once."""

import json

import pytest

from scripts import score
from tests.tiny import random_image
from tests.toy import write_rows


@pytest.fixture
def world(tmp_path):
    random_image(0).save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "what?", "task": "vqa"}
    write_rows(
        tmp_path / "val.jsonl",
        [
            {**row, "id": "1", "image_id": "7", "answers": ["cat"] * 10},
            {**row, "id": "2", "image_id": "8", "answers": ["dog"] * 4 + ["puppy"] * 6},
        ],
    )
    return tmp_path


def run(world, answers, *overrides, benchmark="textvqa"):
    (world / "answers.json").write_text(
        answers if isinstance(answers, str) else json.dumps(answers)
    )
    source = f"{{name: val, format: jsonl, path: {world / 'val.jsonl'}, benchmark: {benchmark}}}"
    options = [f"predictions={world / 'answers.json'}", f"source={source}", f"out={world / 'out'}"]
    score.main([*options, "progress=false", *overrides])
    return json.loads((world / "out" / "val.json").read_text())


def test_a_submission_is_scored_and_comes_out_again(world, capsys):
    answers = [{"question_id": 2, "answer": "Dog."}, {"question_id": 1, "answer": "cow"}]
    record = run(world, [*answers, {"question_id": 3, "answer": "?"}])
    assert record["score"]["value"] == 0.5 and record["n"] == record["num_images"] == 2
    assert record["settings"] == {"num_unanswered": 0, "num_unused": 1}
    handed_in = json.loads((world / "out" / record["submissions"]["textvqa"]).read_text())
    assert sorted(handed_in, key=lambda row: -row["question_id"]) == answers
    assert "vqa_evalai" in capsys.readouterr().out


def test_the_rows_of_an_evaluation_can_be_scored_by_another_rule(world):
    run(world, '{"id": "1", "prediction": "Cat"}\n{"id": "2", "prediction": "puppy"}\n')
    rows = (world / "out" / "val.jsonl").read_text()
    record = run(world, rows, benchmark="vqav2")
    assert record["tasks"]["vqav2"]["metrics"]["vqa_official"]["value"] == 0.5  # "Cat" is not "cat"


def test_captions_are_matched_by_picture(world):
    rows = [{"image_id": 7, "caption": "cat"}, {"image_id": 8, "caption": "a dog"}]
    record = run(world, rows, benchmark="caption")
    assert record["tasks"]["caption"]["metrics"]["exact_match"]["value"] == 0.5


def test_questions_without_an_answer_can_count_as_empty_answers(world):
    record = run(world, [{"question_id": 1, "answer": "cat"}], "missing=empty")
    assert record["score"]["value"] == 0.5 and record["settings"]["num_unanswered"] == 1
    assert record["tasks"]["textvqa"]["failures"] == {"empty answer": 1}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [{"question_id": 1, "answer": "cat"}],
            "1 of 2 questions have no answer, such as 2; missing=",
        ),
        ([{"question_id": 1, "answer": "a"}] * 2, "1 values of question_id stand twice, such as 1"),
        ([{"question_id": 1}], "row 1: has none of answer, prediction, caption, text"),
        ([{"answer": "cat"}], "row 1: has none of question_id"),
        ([{"question_id": 1, "answer": 2}], "row 1: answer must be a text, got 2"),
        ([{"question_id": 9, "answer": "a"}], "2 of 2 questions have no answer"),
        (
            [{"question_id": 1, "answer": "", "predicted_box": [1, 2]}],
            "row 1: predicted_box must be fo",
        ),
        ([], "holds no answers"),
        ("{", "row 1: not JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_error(world, capsys, answers, message):
    with pytest.raises(SystemExit, match="2"):
        run(world, answers, *(["missing=empty"] if "2 of 2" in message else []))
    assert message in capsys.readouterr().err
