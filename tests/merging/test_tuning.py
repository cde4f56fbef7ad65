"""The one rule by which merges are tuned, and its table of options."""

import pytest
import torch

from moa.merging.learn import tuning
from moa.merging.merge import merge
from moa.merging.methods.table import METHODS, TUNED, check_options
from scripts.demo.board.tuned_merge import TunedMerge
from tests.merging.test_merge_identities import experts_of


def updates(merged):
    return torch.cat([(site.lora_b @ site.lora_a).flatten() for site in merged.values()])


def test_the_length_is_the_mean_experts_and_the_best_of_all_scales_and_options_wins():
    experts = experts_of(0)
    norms = [updates(merge([expert])).norm() for expert in experts]
    wanted = tuning.mean_length(experts)
    assert wanted == pytest.approx(float(sum(norms) / 3))
    options = tuning.choices({"reduce": "sum"}, {"density": [0.3, 0.7]})
    assert options == [{"reduce": "sum", "density": 0.3}, {"reduce": "sum", "density": 0.7}]
    made = [(own, merge(experts, method="ties", options=own)) for own in options]
    target = 0.5 * wanted * updates(made[1][1]) / updates(made[1][1]).norm()
    loss = lambda merged: float((updates(merged) - target).norm())  # noqa: E731
    found = tuning.tune(made, wanted, loss)
    assert (found.options, found.scale) == (options[1], 0.5)
    assert found.loss == pytest.approx(0, abs=1e-6) and len(found.tried) == 20
    torch.testing.assert_close(updates(found.merged), target)
    sevenfold = [(own, tuning.scaled(merged, 7.0)) for own, merged in made]
    torch.testing.assert_close(updates(tuning.tune(sevenfold, wanted, loss).merged), target)


def test_shared_experts_are_added_to_what_was_scaled():
    experts = experts_of(1)
    merged = merge(experts[:2])
    whole = tuning.with_added(tuning.scaled(merged, 0.3), experts, ["e2"], "sum")
    own = merge(experts[2:], weights={"e2": 1.0})
    for site, update in whole.items():
        expected = 0.3 * merged[site].lora_b @ merged[site].lora_a + own[site].lora_b @ own[site].lora_a
        torch.testing.assert_close(update.lora_b @ update.lora_a, expected, rtol=1e-6, atol=1e-8)


def test_a_random_direction_is_the_same_at_each_call_and_none_of_the_experts():
    experts = experts_of(0, 1, (2,))
    found, again = (updates(merge([tuning.random_expert(experts, 0)])) for _ in range(2))
    assert torch.equal(found, again)
    other = updates(merge([tuning.random_expert(experts, 1)]))
    for update in (other, updates(merge(experts))):
        assert abs(float(found @ update / found.norm() / update.norm())) < 0.6


def test_every_tuned_option_is_one_of_its_method_and_its_default_may_win():
    for method, (option, values) in TUNED.items():
        default = METHODS[method].options[option]
        assert 1 < len(values) <= 5, method
        for value in values:
            check_options(method, {option: value})
        assert default in values or isinstance(default, float | int), method


def test_the_boards_command_tunes_one_option_at_most():
    with pytest.raises(ValueError, match="grid: is for one option, got"):
        TunedMerge(adapters=["a"], grid={"density": [0.1], "reduce": ["sum"]}, out="o")
