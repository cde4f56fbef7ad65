import shutil

import pytest

from moa.metrics import captions
from moa.metrics.captions import caption_scores, tokenize_captions

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
    lines = ["A man's dog doesn't run, does it?", "Red, green - and blue!", "two-seat bike.", ""]
    tokens, name = tokenize_captions(lines)
    expected = ["a man 's dog does n't run does it", "red green and blue", "two-seat bike", ""]
    assert tokens == expected
    assert ("PTB" in name) == (shutil.which("java") is not None)


def test_without_java_a_stand_in_is_used_and_named(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    lines = ["A man's dog doesn't run, does it?", "Red, green - and blue!", "", "two-seat (old) bike."]
    tokens, name = tokenize_captions(lines)
    expected = ["a man 's dog does n't run does it", "red green and blue", "", "two-seat -lrb- old -rrb- bike"]
    assert (tokens, name) == (expected, "stand-in (no working Java)")


# values of pycocoevalcap 1.2 with its own PTBTokenizer, run as COCOEvalCap runs it
PREDICTIONS = ["A man's dog runs along the beach.", "two red buses (parked) near a shop", "A cat sits, on the grass!"]
SEVERAL = [
    ["A dog is running along a beach.", "The man's dog runs on the beach"],
    ["Two red buses are parked near a shop.", "Red double-decker buses by a shop"],
    ["a cat on the grass", "A cat sits on green grass.", "There is a cat in the grass"],
]
OFFICIAL = {
    "CIDEr": 3.3896393383,
    "ROUGE-L": 0.8355336997,
    "BLEU-1": 0.9130434782,
    "BLEU-2": 0.7703754025,
    "BLEU-3": 0.6251985728,
    "BLEU-4": 0.4322539528,
}


def test_caption_scores_are_those_of_the_official_pipeline():
    scores = caption_scores(PREDICTIONS, SEVERAL)
    assert scores.corpus == pytest.approx(OFFICIAL, abs=1e-9)
    assert scores.cider == pytest.approx([3.27989404, 2.72545608, 4.16356789], abs=1e-8)


def test_without_java_meteor_is_named_as_absent_and_the_rest_is_near(monkeypatch):
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    scores = caption_scores(PREDICTIONS, SEVERAL, meteor=True)
    assert scores.absent == {"METEOR": "no Java here"}
    assert scores.corpus == pytest.approx(OFFICIAL, abs=1e-9)  # PTB's tokens, on these captions


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its destructor
def test_a_meteor_that_does_not_start_is_reported_and_costs_no_other_score(monkeypatch):
    monkeypatch.setattr("pycocoevalcap.meteor.meteor.METEOR_JAR", "no-such.jar")
    scores = caption_scores(PREDICTIONS, SEVERAL, meteor=True)
    assert "gave no score" in scores.absent["METEOR"] and "METEOR" not in scores.corpus
    assert scores.corpus == pytest.approx(OFFICIAL, abs=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor_is_that_of_its_own_program():
    scores = caption_scores(PREDICTIONS, SEVERAL, meteor=True)
    assert scores.corpus["METEOR"] == pytest.approx(0.5075717938, abs=1e-9)
