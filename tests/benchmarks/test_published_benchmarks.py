"""The published benchmarks: what they ask, how they score, what they hand in."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import eval as eval_script
from moa.benchmarks.table import BENCHMARKS, submission_rows
from moa.evaluation.report import write_submissions
from moa.evaluation.result import Result
from tests.benchmarks.test_benchmarks import prediction
from tests.evaluation.test_eval import make_run
from tests.support.toy import write_rows

TEN = ["yes"] * 3 + ["no"] * 7


def scored(name, responses):
    return BENCHMARKS[name].score(responses)


def with_id(made, sample_id, **changes):
    return replace(made, sample=replace(made.sample, id=sample_id, **changes))


@pytest.mark.parametrize(
    ("name", "text", "answers", "expected"),
    [
        ("vqav2", "yes", TEN, 0.9),
        ("vqav2", "Yes", ["yes"] * 10, 0.0),  # all alike: not normalised
        ("okvqa", "no.", TEN, 1.0),
        ("aokvqa", "yes", TEN, 1.0),  # three of ten are enough, nobody is left out
        ("aokvqa", "Yes", TEN, 0.0),
        ("aokvqa_choice", "B", ["B"], 1.0),
        ("textvqa", "Yes", ["yes"] * 10, 1.0),
        ("vizwiz", "unanswerable", ["unanswerable"] * 2 + ["cup"] * 8, 0.6),
        ("docvqa", "statio", ["exit", "station"], 6 / 7),
        ("stvqa", "a", ["abcd"], 0.0),
        ("chartqa", "5.2", ["5"], 1.0),
        ("gqa", "Dog.", ["dog"], 1.0),
        ("scienceqa", "C. the sun", ["C"], 1.0),
        ("pope", "No, there is none", ["no"], 1.0),
    ],
)
def test_each_benchmark_scores_by_its_own_rule(name, text, answers, expected):
    scores = scored(name, [prediction(text, answers)])
    assert next(iter(scores)) == (scores.primary, pytest.approx(expected))


def test_gqa_parts_open_questions_from_those_with_two_answers():
    rows = [("red", "red", "query"), ("blue", "red", "query"), ("yes", "yes", "verify")]
    made = [with_id(prediction(said, [true]), said, tags=(kind, "attr")) for said, true, kind in rows]
    assert dict(scored("gqa", made)) == {"accuracy": pytest.approx(2 / 3), "binary": 1.0, "open": 0.5}


def test_pope_reports_what_the_share_of_yes_hides():
    made = [prediction("Yes", ["yes"]), prediction("Yes", ["no"]), prediction("", ["no"])]
    scores = scored("pope", made)
    assert dict(scores) == {
        "accuracy": pytest.approx(1 / 3),
        "precision": pytest.approx(1 / 3),
        "recall": 1.0,
        "F1": 0.5,
        "yes_ratio": 1.0,
    }
    assert scores.failures == {"empty answer": [2]}  # POPE's rule takes it for a yes


def test_an_answer_that_names_no_option_is_wrong_and_counted():
    scores = scored("scienceqa", [prediction("A", ["A"]), prediction("the first", ["A"])])
    assert dict(scores) == {"accuracy": 0.5}
    assert scores.failures == {"no option named": [1]}


@pytest.mark.parametrize(
    ("name", "answers", "lacks"),
    [
        ("vqav2", ["a"] * 9, "ten reference answers, and has 9"),
        ("chartqa", [" "], "a reference answer"),
        ("pope", ["maybe"], "the answer yes or no"),
        ("scienceqa", ["a dog"], "the letter of an option"),
        ("refcoco", ["a dog"], "a true box"),
    ],
)
def test_what_a_sample_lacks_to_be_scored_is_said(name, answers, lacks):
    found = BENCHMARKS[name].needs(prediction("", answers).sample)
    assert found is not None and lacks in found


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("vqav2", {"question_id": 42, "answer": "A dog."}),
        ("textvqa", {"question_id": 42, "answer": "A dog."}),
        ("vizwiz", {"image": "7", "answer": "A dog."}),
        ("docvqa", {"questionId": 42, "answer": "A dog."}),
        ("stvqa", {"question_id": 42, "answer": "A dog."}),
        ("gqa", {"questionId": "42", "prediction": "a dog"}),
        ("coco_captions", {"image_id": 7, "caption": "A dog."}),
    ],
)
def test_answers_are_handed_in_as_the_server_takes_them(name, row):
    made = with_id(prediction("A dog.", ["dog"], image_id="7"), "42")
    assert submission_rows(BENCHMARKS[name].submission, [made]) == [row]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (["1", "a/2"], "question id 'a/2' is not a whole number"),
        (["1", "2", "1"], "1 values of question_id are not unique, such as 1"),
    ],
)
def test_ids_that_no_server_takes_are_reported_and_cost_no_scores(tmp_path, ids, reason):
    made = [with_id(prediction("cat", ["cat"] * 10), name) for name in ids]
    result = Result(name="set", tasks={"vqav2": (made, scored("vqav2", made))})
    assert write_submissions(tmp_path, result) == {"vqav2": f"not written: {reason}"}
    assert list(tmp_path.iterdir()) == []
    assert result.record()["num_duplicate_ids"] == len(ids) - len(set(ids))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that scores three questions by TextVQA's rule; one has OCR words, one few answers."""
    folder = tmp_path_factory.mktemp("published")
    made = make_run(folder)
    word = {"text": "EXIT", "box": [1, 2, 10, 8], "confidence": 0.9}
    row = {"image": "0.png", "question": "what is written?", "task": "vqa"}
    rows = [
        {**row, "id": "11", "answers": ["exit"] * 10, "ocr": [word]},
        {**row, "id": "12", "answers": ["red"] * 10},
        {**row, "id": "13", "answers": ["red"]},
    ]
    write_rows(folder / "text.jsonl", rows)
    return made


def evaluate(run: Path, *overrides: str) -> dict:
    source = f"{{format: jsonl, path: {run.parent / 'text.jsonl'}, benchmark: textvqa}}"
    options = ["progress=false", "eval.max_new_tokens=4", "eval.num_images=0", "eval.on_bad_sample=skip"]
    eval_script.main([f"run={run}", f"eval.sources={{text: {source}}}", *options, *overrides])
    return json.loads((run / "eval" / "text.json").read_text())


@pytest.mark.slow
def test_a_source_is_scored_by_the_benchmark_that_it_names(run):
    record = evaluate(run)
    assert record["tasks"]["textvqa"]["primary"] == "vqa_evalai"
    assert record["n"] == 2 and record["skipped_samples"][0].endswith("and has 1")
    example = record["settings"]["prompt"]["example"]
    assert example == (
        "[vqa] what is written?\nReference OCR token: EXIT\nAnswer the question using a single word or phrase."
    )
    assert record["num_with_ocr_words"] == 1 and record["settings"]["prompt"]["ocr_in_prompt"]
    assert record["versions"]["pycocoevalcap"] == "1.2"
    handed_in = json.loads((run / "eval" / record["submissions"]["textvqa"]).read_text())
    rows = [json.loads(line) for line in (run / "eval" / "text.jsonl").read_text().splitlines()]
    assert handed_in == [
        {"question_id": 11, "answer": rows[0]["prediction"]},
        {"question_id": 12, "answer": rows[1]["prediction"]},
    ]


@pytest.mark.slow
def test_a_split_with_secret_references_is_answered_but_not_scored(run):
    record = evaluate(run, "eval.score=false")
    assert record["n"] == 3 and record["tasks"]["textvqa"]["primary"] == "answered"
    assert len(json.loads((run / "eval" / "text.textvqa.submission.json").read_text())) == 3


@pytest.mark.slow
def test_an_unknown_benchmark_is_named_with_the_choices(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate(run, "eval.sources.text.benchmark=txtvqa")
    assert "sources.text.benchmark: no benchmark 'txtvqa'; choices: " in capsys.readouterr().err
