"""What is measured of experts before they are merged."""

from dataclasses import replace

from moa.merging.report.before import warnings_before
from tests.merging.test_merge_identities import make_expert

BOTH = {"a": 1.0, "b": 1.0}


def test_experts_alike_in_length_and_apart_in_direction_are_merged_without_a_word():
    shapes = {"layers.0.q_proj": (64, 64)}
    assert not list(warnings_before([make_expert(name, seed, 2, shapes) for seed, name in enumerate("ab")], BOTH))


def test_lengths_directions_and_common_inputs_are_told_with_their_numbers():
    shapes = {"layers.0.q_proj": (64, 64), "layers.1.q_proj": (64, 64)}
    one, other = make_expert("a", 0, 2, shapes), make_expert("b", 1, 2, shapes)
    reads = replace(other, name="c", read=lambda site: (one.read(site)[0], other.read(site)[1]))
    against = replace(one, name="d", read=lambda site: (one.read(site)[0], -3 * one.read(site)[1]))
    lines = list(warnings_before([one, reads], {}))
    assert len(lines) == 1 and "a and c read the same inputs, with a common share of 1.00: each" in lines[0]
    lines = list(warnings_before([one, against], {}))
    assert "longest update is 3.0 times the shortest (a " in lines[0] and "decides a sum" in lines[0]
    assert "a and d have cosine -1.00: a sum undoes" in lines[1] and len(lines) == 2


def test_updates_that_are_alike_are_told_in_one_line_where_they_are_added_up_and_not_of_a_mean():
    shapes = {"layers.0.q_proj": (64, 64)}
    one = make_expert("a", 0, 2, shapes)
    alike = [one, replace(one, name="b"), replace(one, name="c")]
    for weights in ({}, dict.fromkeys("abc", 1 / 3), dict.fromkeys("abc", 0.5)):
        assert not list(warnings_before(alike, weights))
    (line,) = warnings_before(alike, dict.fromkeys("abc", 1.0))
    assert line.startswith("warning: a and b have cosine 1.00 (and 2 other pairs above 0.5): a sum goes too far")
