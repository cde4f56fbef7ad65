"""Weights of triplets and of sites that are learned from what each expert does: against the model itself and loops."""

import pytest
import torch

from moa.merging.adapters import experts_of_bank
from moa.merging.learn import guided, search
from moa.merging.merge import merge
from moa.statistics.gather import own_gates, watch_inputs
from tests.test_model import LANGUAGE, batch_of, make_model

NAMES = ("vqa", "caption", "grounding")


@pytest.fixture(scope="module")
def live():
    model = make_model("fixed", targets=(LANGUAGE,))
    batches = {name: [batch_of(model)] for name in NAMES}
    return guided.Weighed(model=model, experts=experts_of_bank(model.bank), batches=batches)


def test_triplets_at_one_are_the_experts_and_at_these_weights_the_sum_that_is_written(live):
    batch = live.batches["vqa"][0]
    ones = torch.ones(len(batch), 3)
    with torch.no_grad():
        found = live.merged(batch, live.raw(1.0)).logits
        torch.testing.assert_close(found, live.model(batch, ones).logits, rtol=1e-4, atol=1e-4)
    scales = live.raw(1.0)
    for number, scale in enumerate(scales.values()):
        scale.data[:] = torch.rand(len(scale), generator=torch.Generator().manual_seed(number))
    merged = merge(live.apply(scales), method="task_arithmetic")
    site = next(iter(merged))
    expected = torch.zeros_like(merged[site].lora_b @ merged[site].lora_a)
    for expert in live.experts:
        a, b = expert.factors(site, torch.float64)
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        for i, weight in enumerate(scales[site, expert.name].tolist()):
            expected += weight * s[i] * torch.outer(u[:, i], v[i])
    torch.testing.assert_close(merged[site].lora_b @ merged[site].lora_a, expected)


def test_nsc_is_how_much_of_the_merges_inputs_no_row_of_the_expert_reads(live):
    """One expert, its projector by a pseudo-inverse, inputs by a hook of the test's own."""
    model, batch = live.model, live.batches["vqa"][0]
    site = max(model.bank.sites)
    each, rows = [], []
    with torch.no_grad():
        with watch_inputs(model, {site: model.bank.sites[site]}, batch, lambda _, x: rows.append(x)):
            live.merged(batch, live.raw(0.4, by_site=True))
        guided._missed(live, "vqa", each, site, rows[0])
        a = model.bank.sites[site].lora_A["vqa"]
        total = 0.0
        for z in rows[0]:
            read = float(z @ a.T @ torch.linalg.inv(a @ a.T) @ a @ z)
            total += (1 - read / float(z @ z)) ** 0.5
    assert float(each[0]) == pytest.approx(total / len(rows[0]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("learner, lr", [("tara", 0.05), ("adarank", 0.05), ("expert_merging", 0.3), ("nsc", 0.1)])
def test_every_learner_lowers_its_loss_and_leaves_the_experts_as_they_are(live, learner, lr):
    before = [parameter.detach().clone() for parameter in live.model.bank.parameters()]
    losses = []
    live.tick = lambda step, loss: losses.append(loss)
    scales = getattr(guided, learner)(live, steps=3, lr=lr)
    assert losses[-1] < losses[0]
    assert scales.keys() == live.triplets.keys()
    by_site = learner in ("nsc", "expert_merging")
    for place, scale in scales.items():
        assert len(scale) == (1 if by_site else len(live.triplets[place][0]))
    for parameter, old in zip(live.model.bank.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.slow
def test_prodistill_brings_each_block_nearer_to_its_experts_in_the_order_of_the_blocks(live):
    losses = []
    live.tick = lambda step, loss: losses.append(loss)
    guided.prodistill(live, steps=3, lr=0.1)
    assert len(losses) % 3 == 0 and len(losses) >= 6
    for start in range(0, len(losses), 3):
        assert losses[start + 2] < losses[start]


def test_one_expert_alone_has_no_distance_from_itself(live):
    batch = live.batches["vqa"][0]
    blocks = ["model.language_model.layers.0", "model.language_model.layers.1"]
    with torch.no_grad():
        with guided.outputs_of(live.model, blocks, batch) as wanted:
            live.alone("vqa", batch)
        with guided.outputs_of(live.model, blocks, batch) as found:
            live.model(batch, own_gates(live.model, "vqa")(batch))
    assert [*found] == blocks and len(found[blocks[0]]) == int((batch.token_samples() >= 0).sum())
    assert all(float(guided.relative_distance(wanted[block], found[block])) == 0 for block in blocks)


@pytest.mark.slow
def test_pruning_finds_the_pairs_that_hurt_and_prunes_none_where_none_does():
    pairs = [(module, expert) for module in ("0.mlp", "0.attn") for expert in "abc"]
    bad = {("0.mlp", "b"), ("0.attn", "c")}
    options = {"share": 1 / 3, "budget": 40, "optimizer": "CMA", "seed": 0}
    found = search.prune(lambda chosen: len(chosen & bad) - 0.5 * len(chosen - bad), pairs, **options)
    assert found == bad
    assert search.prune(lambda chosen: -len(chosen), pairs, **options | {"budget": 8}) == frozenset()
