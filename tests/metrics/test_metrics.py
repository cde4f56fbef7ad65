import math

import pytest

from moa.metrics.boxes import best_iou, grounding_scores, iou
from moa.metrics.intervals import clustered_standard_error


def test_iou_gives_hand_computed_values():
    assert iou((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0)) == 1.0
    assert iou((0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)) == pytest.approx(50 / 150)
    assert iou((0.0, 0.0, 10.0, 10.0), (10.0, 10.0, 20.0, 20.0)) == 0.0
    # 4 x 3 of 10 x 4 and 6 x 4, whichever comes first and whichever way it is turned
    one, other = (0.0, 0.0, 10.0, 4.0), (6.0, 1.0, 12.0, 5.0)
    turned = [(y0, x0, y1, x1) for x0, y0, x1, y1 in (one, other)]
    for first, second in ((one, other), (other, one), turned):
        assert iou(first, second) == pytest.approx(12 / (40 + 24 - 12))
    assert iou((5.0, 5.0, 5.0, 5.0), (5.0, 5.0, 5.0, 5.0)) == 0.0
    assert iou((8.0, 8.0, 2.0, 2.0), (0.0, 0.0, 10.0, 10.0)) == 0.0  # turned inside out: no area


def test_an_iou_of_just_a_half_is_a_hit_by_one_convention_and_a_miss_by_the_other():
    truths = [[(0.0, 0.0, 10.0, 10.0)], [(0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)], [(0.0, 0.0, 10.0, 10.0)]]
    predicted = [(0.0, 0.0, 10.0, 5.0), (50.0, 50.0, 60.0, 60.0), None]
    scores = grounding_scores(predicted, truths)
    assert scores["Acc@0.5"] == [1.0, 1.0, 0.0]
    assert scores["Acc@>0.5"] == [0.0, 1.0, 0.0]
    assert scores["mean_IoU"] == [0.5, 1.0, 0.0]
    assert scores["unparsable"] == [0.0, 0.0, 1.0]
    assert best_iou((0.0, 0.0, 1.0, 1.0), []) == 0.0


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


def test_the_clustered_standard_error_is_the_hand_computed_one():
    # mean 1/2; clusters (1, 1), (0), (0): deviations sum to 1, -1/2, -1/2, squares to 3/2
    values, clusters = [1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "c"]
    assert clustered_standard_error(values, clusters) == pytest.approx(math.sqrt(3 / 2 * 1.5) / 4)


def test_one_cluster_has_no_known_standard_error():
    assert clustered_standard_error([1.0, 0.0], ["a", "a"]) is None
    assert clustered_standard_error([], []) is None
