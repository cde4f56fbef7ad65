"""Paired intervals: known values and coverage."""

import numpy as np
import pytest
from scipy.stats import t as student

from moa.metrics.intervals import paired_interval


def test_one_seed_of_right_and_wrong_answers_has_the_interval_of_the_closed_form():
    rng = np.random.default_rng(3)
    ours, theirs = ((rng.random((1, 600)) < share).astype(float) for share in (0.8, 0.7))
    found = paired_interval([ours], [theirs])
    difference = ours[0] - theirs[0]
    half = student.ppf(0.975, 599) * difference.std(ddof=1) / 600**0.5
    assert found.value == pytest.approx(difference.mean())
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half])


def test_rows_that_answer_alike_differ_by_nothing_and_have_the_ratio_one():
    scores = [np.random.default_rng(0).random((3, 50)), np.random.default_rng(1).random((3, 20))]
    found = paired_interval(scores, scores)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    ratio = paired_interval(scores, scores, kind="ratio")
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([1, 1, 1])


def test_seeds_alone_have_students_interval_of_their_mean():
    """All questions of a seed alike: nothing but the seeds varies."""
    of_seed = np.array([0.5, 0.6, 0.8, 0.55, 0.7])[:, None]
    found = paired_interval([np.repeat(of_seed, 9, 1)], [np.zeros((5, 9))])
    half = student.ppf(0.975, 4) * of_seed.std(ddof=1) / 5**0.5
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half])


def test_columns_count_alike_however_many_questions_they_have():
    small, large = np.full((2, 4), 1.0), np.full((2, 400), 0.5)
    found = paired_interval([small, large], [np.zeros((2, 4)), np.zeros((2, 400))])
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    ratio = paired_interval([small, large], [large[:, :4], small[:, :1].repeat(400, 1)], kind="ratio")
    assert ratio.value == pytest.approx(1.0)


def test_a_ratio_to_scores_that_do_not_vary_is_as_sure_as_the_difference():
    rng = np.random.default_rng(2)
    ours, theirs = [rng.random((4, 30))], [np.full((4, 30), 0.25)]
    ratio, alone = paired_interval(ours, theirs, kind="ratio"), paired_interval(ours, [np.zeros((4, 30))])
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([4 * x for x in (alone.value, alone.low, alone.high)])
    assert np.isnan(paired_interval(ours, [np.zeros((4, 30))], kind="ratio").low)


@pytest.mark.parametrize("seeds", [2, 5, 8])
@pytest.mark.parametrize(("by_seed", "by_question", "by_answer"), [(0.0, 0.3, 0.3), (0.02, 0.3, 0.3), (0.15, 0.3, 0.3)])
def test_the_interval_holds_the_truth_as_often_as_it_promises(seeds, by_seed, by_question, by_answer):
    rng, held, tries = np.random.default_rng(5), 0, 300
    for _ in range(tries):
        common = rng.normal(0, by_seed, (seeds, 1))
        columns = [
            0.3 + common + rng.normal(0, by_question, (1, 60)) + rng.normal(0, by_answer, (seeds, 60)) for _ in range(2)
        ]
        found = paired_interval(columns, [np.zeros_like(scores) for scores in columns])
        held += found.low <= 0.3 <= found.high
    assert held / tries >= 0.93


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match=r"same seeds and questions in both, got \(2, 4\) and \(2, 5\)"):
        paired_interval([np.zeros((2, 4))], [np.zeros((2, 5))])
