"""RegMean++ and IterIS on a live model: against the same by hand."""

import copy
from dataclasses import replace

import pytest
import torch

from moa.merging.adapters import experts_of_bank
from moa.merging.learn import least_squares
from moa.merging.learn.least_squares import InputPairs, iteris, regmean_pp, restate, with_inputs
from moa.merging.merge import merge
from moa.merging.site_plan import layer_of
from moa.statistics.moments import InputSums
from tests.merging.test_merge_identities import ONE_SITE
from tests.merging.test_merge_regression import COLS, dense, rows_of, world
from tests.test_model import LANGUAGE, batch_of, make_model

OPTIONS = {"ridge": 1e-3}


def merge_by(experts):
    return merge(experts, method="regmean", options=OPTIONS)


def make_world(names=("vqa", "caption")):
    model = make_model("fixed", targets=(LANGUAGE,))
    for name in set(model.bank.names) - set(names):
        model.bank.remove(name)
    return model, {name: [batch_of(model)] for name in names}


def update(result):
    return result.lora_b @ result.lora_a


@pytest.mark.slow
def test_each_block_is_merged_on_what_the_merged_blocks_below_it_make():
    model, batches = make_world()
    experts = experts_of_bank(model.bank)
    found = regmean_pp(model, experts, batches, merge_by)
    plain = merge_by(with_inputs(model, experts, batches))
    assert found.keys() == plain.keys()
    first, second = sorted({layer_of(site) for site in found})
    for site in found:
        if layer_of(site) == first:
            torch.testing.assert_close(update(found[site]), update(plain[site]))
    # by hand: the merged first block is in the base's weights, and no expert there
    changed = copy.deepcopy(model)
    for name, site in changed.bank.sites.items():
        if layer_of(name) == first:
            site.base_layer.weight.data += update(found[name]).float()
            for b in site.lora_B.values():
                b.data.zero_()
    inputs = with_inputs(changed, experts_of_bank(changed.bank), batches)
    own = [replace(expert, inputs=seen.inputs) for expert, seen in zip(experts, inputs, strict=True)]
    expected = merge_by(own)
    differ = 0.0
    for site in found:
        if layer_of(site) == second:
            torch.testing.assert_close(update(found[site]), update(expected[site]), rtol=1e-3, atol=1e-5)
            differ = max(differ, float((update(found[site]) - update(plain[site])).abs().max()))
    assert differ > 1e-3
    assert model.bank.names == ["vqa", "caption"]  # the merge on trial is gone


@pytest.mark.slow
def test_one_expert_is_itself_however_it_is_merged():
    model, batches = make_world(("vqa",))
    (expert,) = experts_of_bank(model.bank)
    options = {"iterations": 2, "ridge": 1e-3}
    for found in (
        regmean_pp(model, [expert], batches, merge_by),
        iteris(model, [expert], batches, merge_by, **options),
    ):
        for site, result in found.items():
            a, b = expert.factors(site, torch.float64)
            torch.testing.assert_close(update(result), b @ a, rtol=1e-4, atol=1e-5)


def test_iteris_is_least_squares_from_the_merges_inputs_to_the_experts_own_outputs():
    experts, own_rows, updates = world(count=2)
    (site,) = ONE_SITE
    merged_rows = [rows + 0.3 * rows_of(None, 50 + k) for k, rows in enumerate(own_rows)]
    restated = []
    for expert, own, seen in zip(experts, own_rows, merged_rows, strict=True):
        pair = InputPairs(merged=InputSums())
        for part in (slice(0, 25), slice(25, None)):
            pair.add(own[part], seen[part])
        restated.append(restate(expert, {site: pair}, ridge=0.0))
    result = merge(restated, method="regmean", options={"ridge": 0.0})[site]
    y = torch.cat([own @ u.T for own, u in zip(own_rows, updates, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(merged_rows), y).solution.T
    torch.testing.assert_close(update(result), expected)
    same = InputPairs(merged=InputSums())
    same.add(own_rows[0], own_rows[0])
    torch.testing.assert_close(dense(restate(experts[0], {site: same}, 0.5)), updates[0])
    assert update(result).shape[1] == COLS


@pytest.mark.slow
def test_the_pairs_of_inputs_are_token_by_token():
    model, batches = make_world()
    experts = experts_of_bank(model.bank)
    merged = merge(experts, method="linear", weights={"vqa": 1.0, "caption": 0.0})
    with least_squares.with_merged(model, merged, experts):
        pairs = least_squares.input_pairs(model, "vqa", batches["vqa"])
    for pair in pairs.values():  # the merge is the expert, so its inputs are the same
        torch.testing.assert_close(pair.cross, pair.merged.second, rtol=1e-3, atol=1e-2)
        assert pair.merged.tokens == int(batches["vqa"][0].attention_mask.sum())
