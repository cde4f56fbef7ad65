"""Sparse merging equals direct transcriptions of the published procedures, whatever the size of the blocks."""

import pytest
import torch

from moa.merging.methods import sparse
from moa.merging.methods.stack import magnitudes_above, stack_of
from moa.merging.methods.table import METHODS

NAMES = ("one", "two", "three")
ONES = torch.ones(3)


@pytest.fixture
def matrices():
    return torch.randn(3, 23, 17, generator=torch.Generator().manual_seed(0))


def stack(matrices, **more):
    return stack_of(site="layer.q", experts=NAMES[: len(matrices)], matrices=matrices, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.001])
def test_a_threshold_is_the_sorted_magnitude(matrices, dtype, density):
    matrices = matrices.to(dtype)
    size = matrices[0].numel()
    expected = matrices.abs().flatten(1).kthvalue(max(size - int(size * density), 1)).values
    found = stack(matrices, block_rows=5).thresholds(density)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.dtype == dtype


def test_thresholds_of_the_model_are_those_of_all_tensors_together(matrices):
    tall = matrices[:, :, :3] * 4
    both = torch.cat([matrices.flatten(1), tall.flatten(1)], 1)
    found = magnitudes_above([stack(matrices), stack(tall)], 0.3)
    size = both.shape[1]
    assert torch.equal(found, both.abs().kthvalue(size - int(size * 0.3)).values)


def ties_merging(rows, keep):
    """Yadav et al. 2023, merge_utils.py: the released procedure on flattened models, disjoint mean, lambda 1."""
    size = rows.shape[1]
    limit = rows.abs().kthvalue(max(size - int(size * keep), 1), dim=1, keepdim=True).values
    kept = rows * (rows.abs() >= limit)
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    chosen = torch.where(sign > 0, kept > 0, kept < 0) * kept
    return chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)


@pytest.mark.parametrize("block_rows", [0, 1, 7])
def test_ties_is_the_released_procedure(matrices, block_rows):
    merged = METHODS["ties"].function(stack(matrices, block_rows=block_rows), ONES)
    expected = ties_merging(matrices.flatten(1), 0.2).view_as(merged)
    torch.testing.assert_close(merged, expected)


def test_ties_over_the_model_is_the_released_procedure_on_the_flattened_model(matrices):
    sites = [stack(matrices), stack(matrices.flip(1)[:, :, :5] * 3)]
    shared = sparse.model_thresholds(sites, density=0.2, scope="model")
    merged = torch.cat([METHODS["ties"].function(s, ONES, shared=shared).flatten() for s in sites])
    rows = torch.cat([s.whole().flatten(1) for s in sites], 1)
    torch.testing.assert_close(merged, ties_merging(rows, 0.2))


def test_a_negative_weight_subtracts():
    block = torch.tensor([[[1.0, 0, 2, -1]], [[0.0, 3, -2, -1]]])
    weights = torch.tensor([1.0, -1])
    # where the two pull the same way once the second is negated, both count; where they cancel, nothing is elected
    assert sparse.elect(block, weights, reduce="sum").tolist() == [[1.0, -3.0, 4.0, 0.0]]
    assert sparse.elect(block, weights, reduce="mean").tolist() == [[1.0, -3.0, 2.0, 0.0]]
    assert sparse.elect(block, weights, reduce="max").tolist() == [[1.0, -3.0, 2.0, 0.0]]
    assert sparse.elect(block[:1], -torch.ones(1)).tolist() == (-block[0]).tolist()


def test_a_weight_counts_in_the_vote_and_in_the_mean():
    block = torch.tensor([[[1.0, 1.0]], [[3.0, 1.0]], [[-1.0, -1.0]]])
    weights = torch.tensor([0.5, 1.0, 2.0])
    # first entry: 0.5 + 3 against 2; second: 0.5 + 1 against 2
    assert sparse.elect(block, weights).tolist() == [[pytest.approx(3.5 / 1.5), -1.0]]
    assert sparse.elect(block, weights, reduce="sum").tolist() == [[3.5, -2.0]]
    assert sparse.elect(block, weights, reduce="max").tolist() == [[3.0, -2.0]]
    # raw: 1 + 3 against 1, 1 + 1 against 1, and the mean is over heads
    assert sparse.elect(block, weights, vote="raw").tolist() == [[1.75, 0.75]]


def test_a_raw_vote_is_pefts(matrices):
    from peft.utils.merge_utils import ties as pefts

    weights = torch.tensor([0.5, 1.0, 2.0])
    density = 0.2
    merged = METHODS["ties"].function(stack(matrices), weights, density=density, vote="raw")
    # PEFT keeps int(density * size) values, the released procedure one more
    size = matrices[0].numel()
    theirs = pefts(list(matrices), weights, (int(density * size) + 1.5) / size)
    torch.testing.assert_close(merged, theirs)


def test_pruning_by_magnitude_is_pefts(matrices):
    from peft.utils.merge_utils import magnitude_prune as pefts

    size, weights = matrices[0].numel(), torch.tensor([0.5, 1.0, -2.0])
    merged = METHODS["magnitude_prune"].function(stack(matrices), weights, density=0.3)
    theirs = pefts(list(matrices), weights, (int(0.3 * size) + 1.5) / size)
    torch.testing.assert_close(merged, theirs)


RANDOM = [
    METHODS["dare_linear"].function,
    METHODS["dare_ties"].function,
    METHODS["della"].function,
    METHODS["della_linear"].function,
]


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_depend_on_seed_and_names_alone(matrices, method):
    weights = torch.tensor([0.2, 0.3, 0.5])
    merged = method(stack(matrices), weights)
    torch.testing.assert_close(merged, method(stack(matrices, block_rows=4), weights))
    turned = stack_of(site="layer.q", experts=NAMES[::-1], matrices=matrices.flip(0))
    torch.testing.assert_close(merged, method(turned, weights.flip(0)))
    assert not torch.equal(merged, method(stack(matrices), weights, seed=1))
    elsewhere = stack_of(site="layer.k", experts=NAMES, matrices=matrices)
    assert not torch.equal(merged, method(elsewhere, weights))


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS["dare_linear"].function, METHODS["della_linear"].function])
def test_the_expectation_over_masks_is_the_sum(method):
    matrices = torch.tensor([[[1.0, 0.5, -1.0, 0.5]], [[0.5, 0.1, 1.0, 0.7]]])
    draws = [method(stack(matrices), torch.ones(2), seed=seed) for seed in range(1000)]
    mean = torch.stack(draws).mean(0)
    torch.testing.assert_close(mean, matrices.sum(0), rtol=0, atol=0.18)  # four standard errors


def test_dare_keeps_the_share_and_divides_by_it(matrices):
    merged = METHODS["dare_linear"].function(stack(matrices[:1]), torch.ones(1), density=0.25)
    kept = merged != 0
    assert 0.15 < kept.float().mean() < 0.35
    torch.testing.assert_close(merged[kept], 4 * matrices[0][kept])


@pytest.mark.parametrize("block_rows", [0, 3])
def test_rescaling_by_l1_gives_the_norm_back(matrices, block_rows):
    one = stack(matrices[:1], block_rows=block_rows)
    merged = METHODS["dare_linear"].function(one, torch.ones(1), density=0.25, rescale="l1")
    torch.testing.assert_close(merged.abs().sum(), matrices[0].abs().sum())


def test_della_keeps_large_values_more_often():
    ramp = stack(torch.arange(1.0, 101.0).expand(1, 400, 100).contiguous())
    kept = METHODS["della_linear"].function(ramp, torch.ones(1), density=0.5, spread=0.4, rescale="none") != 0
    share = kept.float().mean(0)
    assert share[:10].mean() < 0.2 < 0.8 < share[-10:].mean()
    assert abs(share.mean() - 0.5) < 0.02


def test_della_at_full_spread_keeps_the_largest_of_a_row_and_drops_its_smallest():
    """Chances 0, 1/2 and 1 in a row of three, wherever its largest magnitude stands."""
    rows = torch.tensor([[2.0, -3.0, 1.0], [-1.0, 2.0, 3.0], [-3.0, 1.0, 2.0]]).repeat(100, 1)
    one = stack(rows[None])
    merged = METHODS["della_linear"].function(one, torch.ones(1), density=0.5, spread=0.5)
    size = rows.abs()
    assert merged[size == 3].equal(rows[size == 3]) and not merged[size == 1].any()
    middle = merged[size == 2]
    assert set(middle.tolist()) == {0.0, 4.0} and 110 < (middle == 4).sum() < 190
    assert METHODS["della"].function(one, torch.ones(1), density=0.5, spread=0.5).equal(merged)


def test_breadcrumbs_drop_both_ends():
    signs = torch.tensor([1.0, -1.0]).repeat(50).view(1, 10, 10)
    matrices = signs * torch.arange(1.0, 101.0).view(1, 10, 10)
    merged = METHODS["breadcrumbs"].function(stack(matrices), torch.tensor([2.0]), density=0.5, outliers=0.1)
    # the ten largest are gone, and below them int(0.6 * 100) + 1 - 10 stay
    assert (merged[merged != 0] / 2).tolist() == matrices.flatten()[39:90].tolist()
    small = torch.arange(1.0, 10.0).view(1, 3, 3)  # a share of less than one value drops none
    merged = METHODS["breadcrumbs"].function(stack(small), torch.ones(1), density=0.9, outliers=0.01)
    assert merged.max() == 9


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize(
    ("method", "alone"),
    [
        (METHODS["breadcrumbs_ties"].function, METHODS["breadcrumbs"].function),
        (METHODS["dare_ties"].function, METHODS["dare_linear"].function),
        (METHODS["della"].function, METHODS["della_linear"].function),
    ],
)
def test_every_update_is_thinned_by_itself_and_then_they_vote(matrices, method, alone, reduce):
    """What the form without a vote leaves of each one alone, elected."""
    weights, options = torch.tensor([0.5, -1.0, 2.0]), {"density": 0.6}
    thinned = [
        alone(stack_of(site="layer.q", experts=(name,), matrices=m[None]), torch.ones(1), **options)
        for name, m in zip(NAMES, matrices, strict=True)
    ]
    found = method(stack(matrices), weights, reduce=reduce, **options)
    torch.testing.assert_close(found, sparse.elect(torch.stack(thinned), weights, reduce=reduce))


def pcb_merging(rows, ratio, weights):
    """Du et al. 2024, released code: intra- and inter-balancing, then drop and rescale."""

    def clamp(x, low, high):
        size = x.shape[1]
        ordered = x.sort(1)[0]
        least, most = ordered[:, int(size * low)], ordered[:, size - int(size * high) - 1]
        return torch.clamp(x, least[:, None], most[:, None])

    def unit(x):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    size = clamp(rows.abs(), 0.0001, 0.0001)
    score = torch.exp(len(rows) * unit(size) ** 2) * torch.tanh(rows * rows.sum(0))
    scale = unit(clamp(score, 1 - ratio, 0))
    return (weights @ (rows.sign() * size * scale)) / scale.sum(0).clamp(min=1e-12)


def test_pcb_is_the_released_procedure(matrices):
    for weights in (ONES, torch.tensor([1.0, -1.0, 0.5])):
        merged = METHODS["pcb"].function(stack(matrices), weights, ratio=0.1)
        expected = pcb_merging(matrices.flatten(1), 0.1, weights).view_as(merged)
        torch.testing.assert_close(merged, expected)


def test_consensus_keeps_what_enough_experts_need():
    block = torch.tensor([[[1.0, 1.0, 5.0]], [[1.0, 0.1, 0.0]], [[1.0, 0.1, 0.1]]])
    merged = METHODS["consensus"].function(stack(block), ONES, threshold=0.4, at_least=2)
    assert merged.tolist() == [[3.0, 0.0, 0.0]]
    weights = torch.tensor([1.0, -1.0, 1.0])  # now the first entry's total is 1, and all three need it
    merged = METHODS["consensus"].function(stack(block), weights, threshold=0.4, at_least=3)
    assert merged.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (METHODS["ties"].function, {"reduce": "median"}, r"options.reduce: must be one of \['mean'"),
        (METHODS["ties"].function, {"vote": "all"}, "options.vote: must be one of"),
        (METHODS["dare_linear"].function, {"density": 0.0}, r"options.density: must be in \(0, 1\], got 0.0"),
        (METHODS["dare_linear"].function, {"rescale": "l2"}, "options.rescale: must be one of"),
        (METHODS["della"].function, {"density": 0.9, "spread": 0.2}, "options.spread: must keep"),
        (METHODS["breadcrumbs"].function, {"density": 0.9, "outliers": 0.2}, "options.outliers: must be in"),
        (METHODS["pcb"].function, {"ratio": 2.0}, "options.ratio: must be in"),
    ],
)
def test_an_odd_option_is_named(matrices, method, options, message):
    with pytest.raises(ValueError, match=message):
        method(stack(matrices), ONES, **options)


def test_an_odd_density_of_the_model_is_named(matrices):
    with pytest.raises(ValueError, match="options.density"):
        sparse.model_thresholds([stack(matrices)], density=1.5, scope="model")
    with pytest.raises(ValueError, match="options.scope: must be one of"):
        sparse.model_thresholds([stack(matrices)], density=0.5, scope="layer")
