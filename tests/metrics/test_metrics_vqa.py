import pytest

from moa.metrics.vqa import (
    aokvqa_direct,
    normalize_evalai,
    normalize_vqa,
    vqa_accuracy,
    vqa_evalai,
    vqa_official,
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
def test_vqa_official_gives_the_official_values(prediction, answers, expected):
    assert vqa_official(prediction, answers) == pytest.approx(expected)
    assert vqa_accuracy(prediction, answers) == vqa_official(prediction, answers)
    assert vqa_rule(answers) == "official_10"


# Both columns made by running the published code: vqaEval.py as above, and m4c_evaluator.py of
# haotian-liu/LLaVA at c121f04. Prediction, an answer and how often it stands among ten (the others
# are "x"), accuracy by vqaEval.py, accuracy by m4c_evaluator.py.
BOTH = [
    ("cat's", "cat's", 4, 1.0, 1.0),
    ("cat 's", "cat's", 4, 0.0, 1.0),  # EvalAI parts every "'s" from its word
    ("1,000/2", "1000 2", 4, 0.0, 1.0),  # EvalAI drops commas before they can glue
    ("1,000/2", "10002", 4, 1.0, 0.0),
    ("Two", "2", 10, 0.0, 1.0),  # EvalAI normalises also where all answers agree
    ("two\nbirds", "two birds", 10, 1.0, 1.0),
    ("two\tbirds", "2 birds", 5, 1.0, 1.0),
    ("a,b", "ab", 4, 0.0, 1.0),
    ("a,b", "a b", 4, 1.0, 0.0),
    ("what?now", "whatnow", 4, 0.0, 1.0),
    ("really?", "really", 3, 0.9, 0.9),
    ("1.", "1", 4, 1.0, 1.0),
    ("lets go", "let's go", 4, 0.0, 0.0),  # the table has "let's", but not what it was made from
    ("the", "a", 2, 0.6, 0.6),  # both are nothing without their articles
    ("", "", 2, 0.6, 0.6),
    ("", "x", 10, 0.0, 0.0),
]


@pytest.mark.parametrize(("prediction", "answer", "count", "official", "evalai"), BOTH)
def test_the_two_vqa_rules_give_the_values_of_their_own_code(prediction, answer, count, official, evalai):
    answers = [answer] * count + ["x"] * (10 - count)
    assert vqa_official(prediction, answers) == pytest.approx(official)
    assert vqa_evalai(prediction, answers) == pytest.approx(evalai)


@pytest.mark.parametrize("rule", [vqa_official, vqa_evalai])
def test_leaving_one_of_few_answers_out_is_refused(rule):
    with pytest.raises(ValueError, match="needs ten answers, got 9"):
        rule("cat", ["cat"] * 9)


def test_evalai_normalisation_goes_word_by_word():
    assert normalize_evalai("The dog's, at one-way?") == "dog 's at 1 way"
    assert normalize_evalai("Dont\tstop") == "don't stop"


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


@pytest.mark.parametrize("matches, expected", [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (5, 1.0)])
def test_a_okvqa_takes_three_equal_answers_for_certain_and_normalises_nothing(matches, expected):
    answers = ["cat"] * matches + ["Cat", "the cat", "dog", "cat."]
    assert aokvqa_direct("cat", answers) == pytest.approx(expected)


def test_fewer_than_ten_answers_use_a_named_rule_of_any_match():
    assert vqa_rule(["cat", "dog"]) == "any_of_few"
    assert vqa_accuracy("The cat.", ["cat", "dog"]) == 1.0
    assert vqa_accuracy("cow", ["cat", "dog"]) == 0.0
    assert vqa_accuracy("Two", ["2"] * 9) == 1.0
    with pytest.raises(ValueError, match="at least one answer"):
        vqa_accuracy("cat", [])
