"""Moments of inputs: the sketch against the matrix that it stands for, and what hooks see of a live model."""

from dataclasses import replace

import pytest
import torch

from moa.statistics.gather import expert_moments, input_sums, own_gates, sites_of
from moa.statistics.measure import served
from moa.statistics.moments import EXACT_EIGEN, InputSums, leading_directions, null_space_rows, own_directions
from tests.test_model import batch_of, make_model

SITE = "model.language_model.layers.0.self_attn.q_proj"


def sums_of(rows):
    sums = InputSums()
    for part in rows.split(7):
        sums.add(part)
    return sums


def inputs(seed=0, tokens=50, width=6):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.diag(torch.arange(1.0, width + 1).double())
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix + 0.5


def test_a_sketch_of_all_directions_is_the_second_moment():
    x = inputs()
    found = sums_of(x).sketch(6, 6)
    torch.testing.assert_close(found.dense(), x.T @ x / 50)
    torch.testing.assert_close(found.mean, x.mean(0))
    assert found.tokens == 50


def test_a_sketch_keeps_the_leading_directions_and_spreads_the_rest_of_the_trace():
    x = inputs()
    gram = x.T @ x / 50
    values, vectors = torch.linalg.eigh(gram)
    found = sums_of(x).sketch(6, 2)
    expected = vectors @ torch.diag(torch.cat([values[:4].mean().expand(4), values[4:]])) @ vectors.T
    torch.testing.assert_close(found.dense(), expected)
    torch.testing.assert_close(found.dense().trace(), gram.trace())
    axes = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(found.within(axes.T @ found.root), axes.T @ expected @ axes)


def test_fewer_inputs_than_directions_are_exact_and_none_have_no_moments():
    x = inputs(tokens=2)
    torch.testing.assert_close(sums_of(x).sketch(6, 3).dense(), x.T @ x / 2)
    nothing = InputSums().sketch(6, 3)
    assert nothing.tokens == 0 and not nothing.dense().any()


@pytest.mark.slow
def test_few_directions_of_a_large_matrix_are_those_of_the_full_decomposition():
    size = EXACT_EIGEN + 8
    axes = torch.linalg.qr(torch.randn(size, 12, generator=torch.Generator().manual_seed(0))).Q
    wanted = 2.0 ** -torch.arange(12.0)
    vectors, values = leading_directions(axes * wanted @ axes.T, 4)
    torch.testing.assert_close(values, wanted[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((vectors * axes[:, :4]).sum(0).abs(), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_own_directions_are_those_where_one_expert_has_more_input_than_all():
    axis = torch.eye(6, dtype=torch.float64)
    strong = 10 * axis[0].expand(20, 6)  # of both, and so of neither
    found = own_directions([sums_of(torch.cat([strong, axis[k : k + 1]])).sketch(6, 2) for k in (1, 2)], 1)
    unit = found / found.norm(dim=0)
    torch.testing.assert_close(unit.abs(), axis[:, 1:3], rtol=0, atol=1e-2)


# A live model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_model("fixed")


@pytest.mark.slow
def test_moments_are_those_of_the_experts_own_inputs_without_padding(model):
    batch = batch_of(model)
    batches = {name: [batch] for name in model.bank.names}
    found = expert_moments(model, batches)
    assert {name: {*own} for name, own in found.items()} == dict.fromkeys(batches, {*model.bank.sites})
    seen = []
    hook = model.bank.sites[SITE].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(batch, torch.eye(3)[1].expand(len(batch), -1))
    hook.remove()
    rows = seen[0][batch.attention_mask.bool()].double()
    torch.testing.assert_close(found["caption"][SITE].dense(), rows.T @ rows / len(rows))
    assert found["caption"][SITE].tokens == len(rows)
    with pytest.raises(ValueError, match=r"batches.caption: none"):
        expert_moments(model, {**batches, "caption": []})


@pytest.mark.slow
def test_positions_that_predict_answers_have_their_share_however_few_they_are(model):
    batch, options = batch_of(model), (sites_of(model, "vqa"), own_gates(model, "vqa"))
    predicts = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicts[:, :-1] = batch.labels[:, 1:] != -100
    seen = []
    hook = model.bank.sites[SITE].register_forward_pre_hook(lambda m, args: seen.append(args[0].double()))
    found = input_sums(model, options[0], [batch], options[1], answer_share=0.75)
    hook.remove()
    groups = [seen[0][batch.attention_mask.bool() & chosen] for chosen in (predicts, ~predicts)]
    assert 0 < len(groups[0]) < len(groups[1])
    wanted = sum(share * x.T @ x / len(x) for share, x in zip((0.75, 0.25), groups, strict=True))
    torch.testing.assert_close(found[SITE].gram, wanted)
    assert found[SITE].tokens == sum(map(len, groups))
    alike = sum(map(len, groups[:1])) / found[SITE].tokens  # at the share that they have by number, nothing changes
    plain = input_sums(model, options[0], [batch], options[1])
    by_number = input_sums(model, options[0], [batch], options[1], answer_share=alike)
    torch.testing.assert_close(by_number[SITE].gram, plain[SITE].gram)
    generated = input_sums(model, options[0], [replace(batch, labels=None)], options[1], answer_share=0.75)
    torch.testing.assert_close(generated[SITE].gram, plain[SITE].gram)


@pytest.mark.slow
def test_a_shared_expert_is_on_with_each_of_the_others_and_gets_the_samples_of_all():
    shared = make_model("fixed", gates=("always", "routed", "routed"))
    batch = replace(batch_of(shared), expert_ids=torch.tensor([0, 1, 2, 3]))  # vqa, caption, grounding, none
    assert own_gates(shared, "caption")(batch).tolist() == [[1, 1, 0]] * 4
    assert own_gates(shared, "vqa")(batch).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]]
    assert own_gates(shared, "elsewhere")(batch).tolist() == [[0, 0, 0]] * 4
    both = {"vqa", "caption"}
    assert served(shared) == {"vqa": {"vqa"}, "caption": both, "grounding": {"vqa", "grounding"}, None: {"vqa"}}
    assert shared.routing.roles.named("always") == ["vqa"]


@pytest.mark.slow
def test_layers_in_groups_give_what_they_give_at_once(model, monkeypatch):
    batch = batch_of(model)
    options = (model, sites_of(model, "vqa"), [batch], own_gates(model, "vqa"))
    ticks = []
    expected = input_sums(*options)
    monkeypatch.setattr("moa.statistics.gather.GROUP_BYTES", 3e4)
    found = input_sums(*options, tick=lambda: ticks.append(1))
    assert len(ticks) > 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[site].gram, own.gram) for site, own in expected.items())


# Rows in the null space of others -----------------------------------------------------------------


def test_rows_of_a_new_expert_ignore_the_others_inputs_and_follow_its_own():
    axis = torch.eye(6, dtype=torch.float64)
    others = [sums_of(axis[k : k + 1].expand(9, 6)).sketch(6, 3) for k in (0, 1)]
    own = sums_of(torch.cat([9 * axis[0:1], 3 * axis[2:3], 2 * axis[3:4]])).sketch(6, 4)
    start = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    at_random = null_space_rows(start, others, 2)
    torch.testing.assert_close(at_random @ axis[:2].T, torch.zeros(2, 2).double())
    torch.testing.assert_close(at_random @ at_random.T, torch.eye(2).double() / 3)
    led = null_space_rows(start, others, 2, own)
    torch.testing.assert_close(led.abs(), axis[2:4] / 3**0.5)
    more = null_space_rows(torch.randn(3, 6), others, 2, own)  # own directions end, the rest is random
    torch.testing.assert_close(more[:2].abs(), axis[2:4] / 3**0.5)
    torch.testing.assert_close(more @ axis[:2].T, torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match="leaves 4 of 6 directions to a rank of 5"):
        null_space_rows(torch.randn(5, 6), others, 2)


def test_frozen_rows_add_least_to_the_others_outputs_of_all_rows_of_that_count():
    """With as many directions removed as there can be, the crosstalk is the smallest eigenvalues' share."""
    x = inputs(tokens=80)
    others = [sums_of(x).sketch(6, 6)]
    rows = null_space_rows(torch.randn(2, 6), others, 4)
    found = float((x @ rows.T).square().sum()) / 80
    smallest = torch.linalg.eigvalsh(x.T @ x / 80)[:2].sum() / 3
    assert found == pytest.approx(float(smallest))
