"""Weights from a little data: through the live mixture, by search, by greedy soups."""

import pytest
import torch

from moa.merging.adapters import experts_of_bank
from moa.merging.learn import gradient, search
from moa.merging.merge import merge
from tests.test_model import batch_of, make_model


@pytest.fixture(scope="module")
def model():
    return make_model("fixed")


@pytest.mark.slow
def test_learned_weights_lower_the_answers_loss_and_merge_exactly(model):
    batch = batch_of(model)
    losses = []
    weights = gradient.learn_weights(model, [batch], steps=12, lr=0.3, on_step=lambda step, loss: losses.append(loss))
    assert losses[-1] < losses[0]
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-5) for row in weights.values())
    gates = torch.tensor([list(row.values()) for row in weights.values()])
    live = model(batch, gates[None].expand(len(batch), -1, -1))
    merged = merge(experts_of_bank(model.bank), weights=weights)
    for name, site in model.bank.sites.items():
        site.base_layer.weight.data += (merged[name].lora_b @ merged[name].lora_a).float()
    off = torch.zeros(len(batch), len(model.bank.names))
    try:
        torch.testing.assert_close(model(batch, off).logits, live.logits, rtol=1e-4, atol=1e-4)
    finally:
        for name, site in model.bank.sites.items():
            site.base_layer.weight.data -= (merged[name].lora_b @ merged[name].lora_a).float()


def test_entropy_needs_no_right_answer_and_stays_in_its_bounds(model):
    losses = []
    weights = gradient.learn_weights(
        model, [batch_of(model)], objective="entropy", steps=8, lr=0.2, per_site=False,
        on_step=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0]
    rows = [tuple(row.values()) for row in weights.values()]
    assert len(set(rows)) == 1 and all(0 <= value <= 1 for value in rows[0])


def test_learning_leaves_the_model_as_it_was(model):
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    model.train()
    gradient.learn_weights(model, [batch_of(model)], steps=2)
    assert model.training
    model.eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1] and parameter.grad is None


def test_batches_without_answers_are_refused(model):
    with pytest.raises(ValueError, match="needs batches with answers"):
        gradient.learn_weights(model, [])
    with pytest.raises(ValueError, match=r"learn.objective: must be one of"):
        gradient.learn_weights(model, [batch_of(model)], objective="loss")


def bowl(weights):
    """Best at one = 0.8, two = -0.4, and indifferent to three."""
    return -((weights["one"] - 0.8) ** 2) - (weights["two"] + 0.4) ** 2


@pytest.mark.parametrize("optimizer", ["NGOpt", "CMA"])
def test_search_finds_the_best_weights_and_prefers_small_ones(optimizer):
    found = search.search(bowl, ("one", "two", "three"), budget=150, penalty=0.05, optimizer=optimizer)
    assert found["one"] == pytest.approx(0.8, abs=0.15)
    assert found["two"] == pytest.approx(-0.4, abs=0.15)
    assert abs(found["three"]) < 0.2


def test_a_search_is_repeatable_and_an_unknown_optimizer_is_named():
    names = ("one", "two")
    first = search.search(bowl, names, budget=15, seed=3)
    assert first == search.search(bowl, names, budget=15, seed=3)
    with pytest.raises(ValueError, match="optimizer: nevergrad has no 'Adam'"):
        search.search(bowl, names, optimizer="Adam")


def test_a_grid_has_one_value_for_all():
    found = search.grid(lambda w: -abs(w["one"] - 0.3), ("one", "two"), (0.1, 0.3, 0.5))
    assert found == {"one": 0.3, "two": 0.3}


def test_a_greedy_soup_takes_what_helps_strictly():
    values = {"good": 0.7, "twin": 0.7, "bad": 0.1, "other": 0.6}

    def score(weights):
        chosen = [name for name, weight in weights.items() if weight]
        assert len({weight for weight in weights.values() if weight}) == 1
        if "bad" in chosen:
            return 0.2
        together = max(values[name] for name in chosen)
        return together + (0.1 if {"good", "other"} <= set(chosen) else 0.0)

    assert search.greedy_soup(score, list(values)) == {
        "good": 0.5, "twin": 0.0, "bad": 0.0, "other": 0.5
    }  # fmt: skip


def test_experts_that_waver_under_perturbation_come_last():
    sure = torch.tensor([[[0.9, 0.1]], [[0.9, 0.1]]])
    torn = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])  # unsure, but always the same
    wavering = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found = search.order_by_uncertainty({"wavering": wavering, "sure": sure, "torn": torn})
    assert found[-1] == "wavering" and set(found[:2]) == {"sure", "torn"}
