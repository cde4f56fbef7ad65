"""Answers from files: matched by id, scored as eval.py scores, and what is wrong with them said once."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.evaluation.answers import BY_IMAGE, BY_QUESTION, TEXTS, read_answers
from scripts import score
from tests.support.tiny import random_image
from tests.support.toy import write_rows

KEYS = st.sampled_from([*BY_QUESTION, *BY_IMAGE, *TEXTS[:4], "predicted_box", "other"])


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
    (world / "answers.json").write_text(answers if isinstance(answers, str) else json.dumps(answers))
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


def test_two_questions_of_one_id_are_not_given_one_answer(world, capsys):
    rows = (world / "val.jsonl").read_text().replace('"id": "2"', '"id": "1"')
    (world / "val.jsonl").write_text(rows)
    with pytest.raises(SystemExit):
        run(world, [{"question_id": 1, "answer": "cat"}])
    assert "two questions have the id '1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            [{"question_id": 1, "answer": "cat"}],
            "1 of 2 questions have no answer, such as 2; missing=",
        ),
        ([{"question_id": 1, "answer": "a"}] * 2, "row 2: question_id 1 is not unique"),
        ([{"question_id": 1}], "row 1: has none of answer, prediction, caption, text"),
        ([{"answer": "cat"}], "row 1: has none of question_id"),
        ([{"question_id": 1, "answer": 2}], "row 1: answer must be a text, got 2"),
        ([{"question_id": 9, "answer": "a"}], "2 of 2 questions have no answer"),
        (
            [{"question_id": 1, "answer": "", "predicted_box": [1, 2]}],
            "row 1: predicted_box must be fo",
        ),
        ([], "holds no answers"),
        ("{", "row 1: is not JSON"),
        ("[" * 100_000, "row 1: is not JSON"),
        (
            '{"question_id": 1, "answer": "a"}\n{"question_id": 2, "answer": ' + "9" * 5000,
            "row 2: is not",
        ),
        (
            [{"question_id": [1], "answer": "a"}],
            "row 1: question_id must be a text or a whole number",
        ),
        ([{"question_id": 1, "answer": "\ud800"}], "row 1: answer has half of a surrogate pair"),
        ([{"question_id": 1, "answer": "", "predicted_box": [0, 0, 1, float("nan")]}], "finite"),
        ([{"question_id": 1, "answer": "", "predicted_box": [0, 0, 1, 10**400]}], "finite"),
        ([3], "row 1: has none of question_id"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_error(world, capsys, answers, message):
    with pytest.raises(SystemExit, match="2"):
        run(world, answers, *(["missing=empty"] if "2 of 2" in message else []))
    assert message in capsys.readouterr().err


PAIRS = [("answer", "prediction"), ("answer", "text"), ("text", "caption"), ("answer", "response")]


@pytest.mark.parametrize("keys", PAIRS)
def test_of_two_texts_in_a_row_the_caller_names_the_output(world, capsys, keys):
    """One of them may be the reference; it may also come first in a later row alone."""
    rows = [dict.fromkeys(keys, "cat") | {"id": "1"}, {"id": "2", keys[0]: "dog", keys[1]: "cow"}]
    for written in (rows, [{"id": "1", keys[0]: "cat"}, rows[1]]):
        with pytest.raises(SystemExit, match="2"):
            run(world, written)
        shown = capsys.readouterr().err
        assert all(key in shown for key in keys) and "text_key=" in shown
    assert run(world, rows, f"text_key={keys[0]}")["score"]["value"] == 1.0
    assert run(world, rows, f"text_key={keys[1]}")["score"]["value"] == 0.5


@pytest.mark.parametrize("key", ["Prediction", "gpt4_output", "llava_reply", "result", "final_answer"])
def test_an_output_of_another_name_beside_a_reference_is_named_by_the_caller(world, capsys, key):
    rows = [{"id": "1", "answer": "cat", key: "cat"}, {"id": "2", "answer": "dog", key: "cow"}]
    with pytest.raises(SystemExit, match="2"):
        run(world, rows)
    assert f"text_key={key}" in capsys.readouterr().err
    assert run(world, rows, f"text_key={key}")["score"]["value"] == 0.5


def test_what_an_answer_file_says_of_its_model_is_not_taken_for_an_output(world):
    beside = {"answer_id": "a", "model_id": "llava", "answer_type": "other", "prompt": "q"}
    rows = [{"id": "1", "text": "cat", **beside}, {"id": "2", "text": "cow", **beside}]
    assert run(world, rows)["score"]["value"] == 0.5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("as_lines", [True, False])
def test_an_answer_may_hold_any_break_and_a_file_may_begin_with_a_bom(tmp_path, encoding, as_lines):
    said = "a\u2028b\u2029c\u0085d\x1ce"
    rows = [{"id": "1", "answer": said}, {"id": "2", "answer": "c"}]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\r\n".join(texts) if as_lines else f"[{', '.join(texts)}]"
    (tmp_path / "a.json").write_bytes(text.encode(encoding))
    assert read_answers(tmp_path / "a.json").found == {"1": (said, None), "2": ("c", None)}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=4),
    as_lines=st.booleans(),
    cut=st.integers(0, 3),
)
def test_any_file_is_read_or_refused_by_its_name(tmp_path_factory, rows, as_lines, cut):
    file = tmp_path_factory.getbasetemp() / "fuzz.json"
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows)
    file.write_text(text[: len(text) - cut])
    try:
        found = read_answers(file).found
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
    else:
        assert len(found) == len(rows) and all(isinstance(said, str) for said, _ in found.values())
