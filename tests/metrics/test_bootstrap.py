"""Paired bootstrap intervals: known values and coverage."""

import numpy as np
import pytest

from moa.metrics.bootstrap import paired_interval


def test_one_seed_of_right_and_wrong_answers_has_the_interval_of_the_closed_form():
    rng = np.random.default_rng(3)
    ours, theirs = ((rng.random((1, 600)) < share).astype(float) for share in (0.8, 0.7))
    found = paired_interval([ours], [theirs])
    difference = ours[0] - theirs[0]
    half = 1.96 * difference.std(ddof=1) / 600**0.5
    assert found.value == pytest.approx(difference.mean())
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.004)


def test_rows_that_answer_alike_differ_by_nothing_and_have_the_ratio_one():
    scores = [np.random.default_rng(0).random((3, 50)), np.random.default_rng(1).random((3, 20))]
    found = paired_interval(scores, scores)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    ratio = paired_interval(scores, scores, kind="ratio")
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([1, 1, 1])


def test_seeds_alone_have_the_standard_error_of_their_mean():
    """All questions of a seed alike: nothing but the seeds varies."""
    of_seed = np.array([0.5, 0.6, 0.8, 0.55, 0.7, 0.65, 0.62, 0.58, 0.71, 0.66])[:, None]
    found = paired_interval([np.repeat(of_seed, 9, 1)], [np.zeros((10, 9))], draws=20_000)
    half = 1.96 * of_seed.std(ddof=1) / 10**0.5
    assert [found.low, found.high] == pytest.approx([found.value - half, found.value + half], abs=0.006)


def test_columns_count_alike_however_many_questions_they_have():
    small, large = np.full((2, 4), 1.0), np.full((2, 400), 0.5)
    found = paired_interval([small, large], [np.zeros((2, 4)), np.zeros((2, 400))])
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    ratio = paired_interval([small, large], [large[:, :4], small[:, :1].repeat(400, 1)], kind="ratio")
    assert ratio.value == pytest.approx(1.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_promises():
    rng, held = np.random.default_rng(5), 0
    for _ in range(200):
        seeds, questions = rng.normal(0, 0.1, (6, 1)), rng.normal(0, 0.5, (1, 100))
        scores = 0.3 + seeds + questions + rng.normal(0, 0.3, (6, 100))
        found = paired_interval([scores], [np.zeros_like(scores)], draws=400)
        held += found.low <= 0.3 <= found.high
    assert 0.89 <= held / 200 <= 0.99


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match=r"same seeds and questions in both, got \(2, 4\) and \(2, 5\)"):
        paired_interval([np.zeros((2, 4))], [np.zeros((2, 5))])
