import math
import shutil

import pytest

from moa import metrics
from moa.metrics import (
    anls,
    best_iou,
    caption_scores,
    clustered_standard_error,
    exact_match,
    grounding_scores,
    iou,
    levenshtein,
    normalize_vqa,
    tokenize_captions,
    vqa_accuracy,
    vqa_rule,
)

# made with the official vqaEval.py (GT-Vision-Lab/VQA, commit a013f00): prediction, answers, accuracy
OFFICIAL = [
    ("2", ["2"] * 10, 1.0),
    ("Two", ["2"] * 10, 0.0),  # all answers alike: the official code then normalises nothing
    ("two", ["2"] * 9 + ["3"], 1.0),
    ("yes", ["yes"] * 3 + ["no"] * 7, 0.9),
    ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
    ("yes", ["yes"] + ["no"] * 9, 0.3),
    ("no.", ["no"] * 9 + ["yes"], 1.0),
    ("the red car!", ["red car"] * 5 + ["car"] * 5, 1.0),
    ("1,000", ["1000"] * 4 + ["1k"] * 6, 1.0),
    ("dont know", ["don't know"] * 10, 0.0),
    ("dont know", ["don't know"] * 9 + ["x"], 1.0),
    ("t-shirt", ["t shirt"] * 4 + ["shirt"] * 6, 1.0),
    ("somebody'd", ["somebodyd"] * 4 + ["x"] * 6, 1.0),
    ("9.5", ["9.5"] * 6 + ["9"] * 4, 1.0),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), OFFICIAL)
def test_vqa_accuracy_gives_the_official_values(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == pytest.approx(expected)
    assert vqa_rule(answers) == "official_10"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat, a dog", "cat dog"),
        ("red/blue", "red blue"),
        ("red/ blue", "red blue"),
        ("1,000/2", "10002"),  # a comma between digits glues every mark of the text
        ("none of ten", "0 of 10"),
        ("yall'll go", "y'all'll go"),
        ("ow's'at", "'ow's'at"),
        ("5 p.m.", "5 pm"),
        ("1.5", "1.5"),
        ("." * 40, "." * 8),  # re.UNICODE (32) stands where the count belongs
    ],
)
def test_vqa_normalisation_keeps_the_official_quirks(text, expected):
    assert normalize_vqa(text) == expected


def test_fewer_than_ten_answers_use_a_named_rule_of_any_match():
    assert vqa_rule(["cat", "dog"]) == "any_of_few"
    assert vqa_accuracy("The cat.", ["cat", "dog"]) == 1.0
    assert vqa_accuracy("cow", ["cat", "dog"]) == 0.0
    assert vqa_accuracy("Two", ["2"] * 9) == 1.0
    with pytest.raises(ValueError, match="at least one answer"):
        vqa_accuracy("cat", [])


def test_exact_match_ignores_case_blanks_and_the_final_period_only():
    assert exact_match(" Two  dogs. ", ["cat", "two dogs"]) == 1.0
    assert exact_match("dog", ["dogs"]) == 0.0
    assert exact_match("", ["dogs"]) == 0.0


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_levenshtein_gives_textbook_distances(first, second, distance):
    assert levenshtein(first, second) == levenshtein(second, first) == distance


def test_anls_takes_the_nearest_answer_and_drops_the_far_ones():
    assert anls("STATION", ["station"]) == 1.0
    assert anls("statio", ["exit", "station"]) == pytest.approx(6 / 7)
    assert anls("ab", ["abcd"]) == 0.5  # at the threshold it counts
    assert anls("a", ["abcd"]) == 0.0
    assert anls("a", ["abcd"], threshold=0.25) == 0.25


def test_iou_gives_hand_computed_values():
    assert iou((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0)) == 1.0
    assert iou((0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)) == pytest.approx(50 / 150)
    assert iou((0.0, 0.0, 10.0, 10.0), (10.0, 10.0, 20.0, 20.0)) == 0.0
    assert iou((5.0, 5.0, 5.0, 5.0), (5.0, 5.0, 5.0, 5.0)) == 0.0
    assert iou((8.0, 8.0, 2.0, 2.0), (0.0, 0.0, 10.0, 10.0)) == 0.0  # turned inside out: no area


def test_grounding_counts_unparsable_answers_as_misses_and_half_as_a_hit():
    truths = [
        [(0.0, 0.0, 10.0, 10.0)],
        [(0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)],
        [(0.0, 0.0, 10.0, 10.0)],
    ]
    predicted = [(0.0, 0.0, 10.0, 5.0), (50.0, 50.0, 60.0, 60.0), None]
    scores = grounding_scores(predicted, truths)
    assert scores["Acc@0.5"] == [1.0, 1.0, 0.0]
    assert scores["mean_IoU"] == [0.5, 1.0, 0.0]
    assert scores["unparsable"] == [0.0, 0.0, 1.0]
    assert best_iou((0.0, 0.0, 1.0, 1.0), []) == 0.0


REFERENCES = [["a red cat sits on the grass"], ["two dogs run along a beach"], ["a blue bus"]]


def test_perfect_captions_reach_the_top_of_every_scale():
    predictions = [refs[0] for refs in REFERENCES[:2]]
    scores = caption_scores(predictions, REFERENCES[:2])
    assert scores.corpus["CIDEr"] == pytest.approx(10.0)
    assert scores.corpus["BLEU-4"] == pytest.approx(1.0, abs=1e-6)
    assert scores.corpus["ROUGE-L"] == pytest.approx(1.0)
    assert scores.cider == pytest.approx([10.0, 10.0])


def test_caption_scores_give_hand_computed_rouge_and_bleu():
    scores = caption_scores(["a red dog"], [["a red cat"]])
    assert scores.corpus["ROUGE-L"] == pytest.approx(2 / 3)  # P = R = 2/3
    assert scores.corpus["BLEU-1"] == pytest.approx(2 / 3)
    assert scores.corpus["CIDEr"] == 0.0  # one picture: every n-gram is in every document


def test_empty_captions_score_zero_and_do_not_shift_their_neighbours():
    scores = caption_scores(["", "two dogs run along a beach", ""], REFERENCES)
    assert scores.cider[0] == scores.cider[2] == 0.0
    assert scores.cider[1] == pytest.approx(10.0)
    with pytest.raises(ValueError, match="at least one reference"):
        caption_scores(["a"], [[]])


def test_captions_are_tokenised_as_ptb_does():
    lines = ["A man's dog doesn't run, does it?", "Red, green - and blue!", "two-seat bike."]
    tokens, name = tokenize_captions(lines)
    assert tokens == ["a man 's dog does n't run does it", "red green and blue", "two-seat bike"]
    assert ("PTB" in name) == (shutil.which("java") is not None)


def test_without_java_a_stand_in_is_used_and_named(monkeypatch):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    lines = ["A man's dog doesn't run, does it?", "Red, green - and blue!", "", "two-seat bike."]
    tokens, name = tokenize_captions(lines)
    expected = ["a man 's dog does n't run does it", "red green and blue", "", "two-seat bike"]
    assert (tokens, name) == (expected, "stand-in (no working Java)")


def test_clusters_of_one_give_the_usual_standard_error():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    mean = sum(values) / 5
    usual = math.sqrt(sum((v - mean) ** 2 for v in values) / 4 / 5)
    assert clustered_standard_error(values, range(5)) == pytest.approx(usual)


def test_asking_each_picture_twice_does_not_shrink_the_standard_error():
    values, clusters = [0.0, 1.0, 1.0], ["a", "b", "c"]
    once = clustered_standard_error(values, clusters)
    twice = clustered_standard_error(values * 2, clusters * 2)
    assert twice == pytest.approx(once)
    assert clustered_standard_error(values * 2, range(6)) < once


def test_one_cluster_has_no_known_standard_error():
    assert clustered_standard_error([1.0, 0.0], ["a", "a"]) is None
    assert clustered_standard_error([], []) is None
