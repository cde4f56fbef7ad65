import pytest

from moa.metrics.text import (
    anls,
    exact_match,
    gqa_match,
    levenshtein,
    option_letter,
    relaxed_accuracy,
    yes_no_scores,
    yes_or_no,
)


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


# by the RRC server's rule (infographicsvqa_eval.py, as QwenLM/Qwen-VL ships it), run on these pairs
RRC = [
    ("station  road", ["Station Road"], 1.0),  # blanks are single in the distance ...
    ("a    b", ["a c"], 1 - 1 / 6),  # ... but count in the length: 1 of 6, not of 3
    ("stra\u00dfe", ["strasse"], 1 - 2 / 7),
    ("", [""], 1.0),
    ("", ["x"], 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), RRC)
def test_anls_gives_the_servers_values(prediction, answers, expected):
    assert anls(prediction, answers) == pytest.approx(expected)


# by relaxed_correctness of google-research/pix2struct at 945f27e: prediction, target, correct
RELAXED = [
    ("5.25", "5", 1.0),
    ("5.26", "5", 0.0),
    ("4.75", "5", 1.0),
    ("-5", "5", 0.0),
    ("100%", "96%", 1.0),  # these four stand in pix2struct's own metrics_test.py
    ("100%", "94%", 0.0),
    ("100%", "0.96", 1.0),
    ("Abc", "abc", 1.0),
    ("12", "12%", 0.0),
    ("2010", "2015", 1.0),  # a year is a number
    ("1,000", "1000", 0.0),  # not a number, and not the same text
    ("1,000", "1,000", 1.0),
    ("0.0", "0", 0.0),  # a share of 0 is undefined: literal
    ("0", "0", 1.0),
    ("nan", "5", 0.0),
    ("", "5", 0.0),
]


@pytest.mark.parametrize(("prediction", "target", "expected"), RELAXED)
def test_relaxed_accuracy_gives_the_published_codes_values(prediction, target, expected):
    assert relaxed_accuracy(prediction, [target]) == expected


def test_relaxed_accuracy_takes_the_nearest_of_several_answers():
    assert relaxed_accuracy("7", ["5", "7.1"]) == 1.0


def test_gqa_forgives_case_and_final_periods_only():
    assert gqa_match("Dog.", "dog") == 1.0
    assert gqa_match("a dog", "dog") == 0.0
    assert gqa_match("dog ", "dog") == 0.0


# by the parsing rule of eval_science_qa.py in haotian-liu/LLaVA at c121f04: answer, options, letter
OPTIONS = [
    ("B", 2, "B"),
    ("B. because it is red", 2, "B"),
    ("The answer is B.", 2, "B"),
    ("So: The answer is B, since", 4, "B"),  # any character stands for the period
    ("The answer is B", 4, None),  # nothing stands for it
    ("The answer is A. The answer is B.", 4, None),
    ("C", 2, None),  # the question has no third option
    ("b", 2, None),
    ("B.", 2, None),  # neither the letter nor the letter with a text
    ("AB", 2, None),
    ("", 2, None),
]


@pytest.mark.parametrize(("prediction", "num_options", "expected"), OPTIONS)
def test_option_letters_are_read_as_llava_reads_them(prediction, num_options, expected):
    assert option_letter(prediction, num_options) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("No, there is none.", "no"),
        ("There is not", "no"),
        ("Yes. But no dog", "yes"),  # only the first sentence counts
        ("NO", "yes"),
        ("no\n", "yes"),  # parted by blanks alone
        ("", "yes"),
    ],
)
def test_yes_or_no_keeps_popes_quirks(prediction, expected):
    assert yes_or_no(prediction) == expected


def test_yes_no_scores_are_those_of_the_counts():
    predictions = ["yes"] * 6 + ["no"] * 4
    labels = ["yes"] * 4 + ["no"] * 2 + ["yes"] * 1 + ["no"] * 3  # TP 4, FP 2, FN 1, TN 3
    assert yes_no_scores(predictions, labels) == {
        "accuracy": 0.7,
        "precision": pytest.approx(4 / 6),
        "recall": 0.8,
        "F1": pytest.approx(8 / 11),  # 2 TP / (2 TP + FP + FN)
        "yes_ratio": 0.6,
    }


def test_a_model_that_never_says_yes_has_no_precision_to_divide_by():
    scores = yes_no_scores(["no", "no"], ["yes", "no"])
    assert scores["precision"] == scores["recall"] == scores["F1"] == scores["yes_ratio"] == 0.0
    assert scores["accuracy"] == 0.5
