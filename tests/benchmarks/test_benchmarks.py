from dataclasses import replace

import pytest
from PIL import Image

from data.sample import Sample
from moa.benchmarks.scores import Response, Scores, with_error
from moa.benchmarks.table import BENCHMARKS

IMAGE = Image.new("RGB", (40, 30))


def prediction(text, answers=(), *, task="vqa", boxes=(), box=None, image_id="p", gates=None):
    sample = Sample(
        id=f"{image_id}/{task}",
        image_id=image_id,
        image=IMAGE,
        question="what is this?",
        answers=tuple(answers),
        task=task,
        source=task,
        boxes=tuple(boxes),
    )
    return Response(sample=sample, text=text, box=box, gates=gates)


def test_every_benchmark_yields_its_primary_score_first_and_within_zero_and_one():
    truth = (0.0, 0.0, 10.0, 10.0)
    cases = {
        "vqa_accuracy": (BENCHMARKS["vqa"], [prediction("cat", ["cat"])]),
        "exact_match": (BENCHMARKS["count"], [prediction("two", ["two"])]),
        "CIDEr/10": (BENCHMARKS["caption"], [prediction("a red cat sits", ["a red cat sits"])] * 2),
        "Acc@0.5": (BENCHMARKS["grounding"], [prediction("", boxes=[truth], box=truth)]),
    }
    for name, (benchmark, responses) in cases.items():
        first, value = next(iter(benchmark.score(responses)))
        assert first == name and 0 <= value <= 1


def test_vqa_reports_its_rule_and_the_plain_match_beside_the_soft_score():
    scores = BENCHMARKS["vqa"].score([prediction("yes", ["yes"] * 2 + ["no"] * 8), prediction("The cat", ["cat"])])
    assert dict(scores) == {"vqa_accuracy": pytest.approx(0.8), "exact_match": 0.5}
    assert scores.notes == {"rule": "any_of_few: 1, official_10: 1"}


def test_ocr_vqa_gives_part_of_the_credit_by_anls_only():
    scores = BENCHMARKS["ocr_vqa"].score([prediction("STATIO", ["station"]), prediction("", ["exit"])])
    assert dict(scores) == {"exact_match": 0.0, "ANLS": pytest.approx(3 / 7)}
    assert scores.failures == {"empty answer": [1]}


def test_classes_are_scored_by_their_names_and_other_texts_are_counted():
    found = [
        prediction(said, [name]) for said, name in (("Cat.", "cat"), ("dog", "cat"), ("cat", "dog"), ("a fox", "dog"))
    ]
    known = [replace(r, sample=replace(r.sample, choices=("cat", "dog"))) for r in [*found, prediction("cat", ["cat"])]]
    scores = BENCHMARKS["classification"].score(known)
    assert dict(scores) == {"accuracy": 0.4, "mean_per_class": pytest.approx((2 / 3 + 0) / 2)}
    assert scores.failures == {"no class named": [3]}
    assert BENCHMARKS["classification"].score(found).failures == {}


def test_captions_report_cider_in_its_own_unit_and_as_a_share():
    captions = ["a red cat sits on the grass", "two dogs run along a beach"]
    scores = BENCHMARKS["caption"].score([prediction(c, [c], task="caption") for c in captions])
    assert dict(scores)["CIDEr/10"] == pytest.approx(1.0)
    assert scores.corpus["CIDEr"] == pytest.approx(10.0)
    assert scores.corpus["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    assert "2 samples" in scores.notes["document_frequencies"]


def test_grounding_lists_the_answers_without_a_box():
    truth = (0.0, 0.0, 10.0, 10.0)
    scores = BENCHMARKS["grounding"].score(
        [prediction("?", boxes=[truth]), prediction("<loc>", boxes=[truth], box=truth)]
    )
    assert dict(scores) == {"Acc@0.5": 0.5, "Acc@>0.5": 0.5, "mean_IoU": 0.5, "unparsable": 0.5}
    assert scores.failures == {"no readable box": [0]}


def test_standard_errors_are_clustered_by_image():
    samples = [prediction("", image_id=i).sample for i in "aabb"]
    assert with_error([1.0, 1.0, 0.0, 0.0], samples) == {"value": 0.5, "se": pytest.approx(0.5)}


def test_the_mean_of_nothing_is_not_a_number():
    scores = Scores(primary="exact_match", values={"exact_match": []})
    assert str(dict(scores)["exact_match"]) == "nan"
