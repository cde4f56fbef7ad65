"""Factor-wise merging reproduces the published and released procedures on raw factors."""

import pytest
import torch

from moa.merging.methods import factorwise
from moa.merging.methods.stack import stack_of

NAMES = ("one", "two", "three")
ONES = torch.ones(3)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, 21, generator=generator)
    b = torch.randn(3, 17, 8, generator=generator)
    return a, b


def stacks(a, b):
    return tuple(stack_of(site="q", experts=NAMES[: len(a)], matrices=m) for m in (a, b))


def released_robustmerge(a, b):
    """llava/model/builder.py of the authors' repository, as a transcription: T tasks, r ranks."""

    def mask_of(w):
        size = w.shape[1] * w.shape[2]
        kth = w.abs().flatten(1).kthvalue(int(size * 0.8), dim=1).values
        return (w.abs() >= kth[:, None, None]).to(w.dtype)

    scale = a.abs().sum(-1) / (mask_of(a) * a).abs().sum(-1)
    ordered = scale.sort(1).values
    scale = scale.clamp(ordered[:, int(a.shape[1] * 0.8), None], ordered[:, -1:])
    merged_a = (2.0 * mask_of(a) * a).sum(0)
    weighted = 2.0 * scale[:, None] * mask_of(b) * b
    return merged_a, weighted.sum(0) / scale[:, None].sum(0)


def test_robustmerge_official_code_is_the_released_procedure(pair):
    a, b = factorwise.robustmerge(*stacks(*pair), ONES, variant="official_code")
    expected_a, expected_b = released_robustmerge(*pair)
    torch.testing.assert_close(a, expected_a)
    torch.testing.assert_close(b, expected_b)


@pytest.mark.parametrize("variant", ["paper_per_task", "paper_factor_sum"])
def test_robustmerge_of_the_paper(pair, variant):
    """Zeng et al. 2025: equations 2 to 4, then algorithm 1 or the product of sums."""
    a, weights = pair[0], torch.tensor([0.5, -1.0, 2.0])
    kept_a, kept_b = (
        w * (w.abs() >= w.abs().flatten(1).kthvalue(int(w[0].numel() * 0.8)).values[:, None, None]) for w in pair
    )
    scale = a.abs().sum(-1) / kept_a.abs().sum(-1)
    scale = weights[:, None] * scale / scale.sum(0)
    if variant == "paper_per_task":
        expected = 2 * sum(kept_b[n] @ torch.diag(scale[n]) @ kept_a[n] for n in range(3))
    else:
        expected = 2 * sum(kept_b[n] @ torch.diag(scale[n]) for n in range(3)) @ kept_a.sum(0)
    merged_a, merged_b = factorwise.robustmerge(*stacks(*pair), weights, variant=variant)
    torch.testing.assert_close(merged_b @ merged_a, expected)


@pytest.mark.parametrize("variant, power", [("paper_per_task", 1), ("paper_factor_sum", 1), ("official_code", 2)])
def test_the_strength_of_robustmerge_counts_once_and_in_the_released_code_twice(pair, variant, power):
    one, three = (factorwise.robustmerge(*stacks(*pair), ONES, variant=variant, strength=s) for s in (1.0, 3.0))
    torch.testing.assert_close(three[1] @ three[0], 3**power * (one[1] @ one[0]))


@pytest.mark.parametrize("variant", ["paper_per_task", "paper_factor_sum", "official_code"])
def test_a_fully_pruned_row_gives_no_nan(pair, variant):
    a, b = pair
    a[0, 0] *= 1e-6
    assert not released_robustmerge(a, b)[1].isfinite().all()
    merged = factorwise.robustmerge(*stacks(a, b), ONES, variant=variant)
    assert all(torch.isfinite(m).all() for m in merged)


def test_lorahub_is_quadratic_in_its_weights(pair):
    weights = torch.tensor([0.5, -1.0, 0.25])
    a, b = factorwise.lorahub_factors(*stacks(*pair), weights)
    expected = sum(w * m for w, m in zip(weights, pair[1], strict=True)) @ sum(
        w * m for w, m in zip(weights, pair[0], strict=True)
    )
    torch.testing.assert_close(b @ a, expected)
    again = factorwise.lorahub_factors(*stacks(*pair), -weights)
    torch.testing.assert_close(again[1] @ again[0], expected)


@pytest.mark.parametrize("align", ["procrustes", "permutation"])
def test_aligning_undoes_a_turned_rank_axis(pair, align):
    """One expert, written three ways: without alignment the mean of factors is another update."""
    a, b = pair[0][0], pair[1][0]
    generator = torch.Generator().manual_seed(1)
    turns = [torch.eye(8)]
    for _ in range(2):
        if align == "procrustes":
            turns.append(torch.linalg.qr(torch.randn(8, 8, generator=generator))[0])
        else:
            turns.append(torch.eye(8)[torch.randperm(8, generator=generator)])
    all_a, all_b = torch.stack([r.T @ a for r in turns]), torch.stack([b @ r for r in turns])
    third = torch.full((3,), 1 / 3)
    merged = factorwise.aligned_linear(*stacks(all_a, all_b), third, align=align)
    torch.testing.assert_close(merged[1] @ merged[0], b @ a, rtol=1e-4, atol=1e-4)
    plain = all_b.mean(0) @ all_a.mean(0)
    assert (plain - b @ a).norm() > 0.3 * (b @ a).norm()


@pytest.mark.parametrize("align", ["procrustes", "permutation"])
@pytest.mark.parametrize("lacking", [0, 1])
def test_either_factor_alone_decides_the_alignment(pair, align, lacking):
    """With one factor zero everywhere the other's turned copies still find each other."""
    turns = [torch.eye(8), torch.eye(8).flip(0), torch.eye(8).roll(3, 0)]
    a = torch.stack([r.T @ pair[0][0] for r in turns])
    b = torch.stack([pair[1][0] @ r for r in turns])
    both = [a, b]
    both[lacking] = torch.zeros_like(both[lacking])
    merged = factorwise.aligned_linear(*stacks(*both), torch.full((3,), 1 / 3), align=align)
    if lacking == 0:
        torch.testing.assert_close(merged[1] @ merged[1].T, b[0] @ b[0].T, rtol=1e-4, atol=1e-3)
    else:
        torch.testing.assert_close(merged[0].T @ merged[0], a[0].T @ a[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("align", ["procrustes", "permutation", "balanced"])
def test_aligning_changes_no_experts_own_update(pair, align):
    for index, weights in enumerate(torch.eye(3)):
        merged = factorwise.aligned_linear(*stacks(*pair), weights, align=align)
        own = pair[1][index] @ pair[0][index]
        torch.testing.assert_close(merged[1] @ merged[0], own, rtol=1e-4, atol=1e-3)


def test_balanced_alignment_undoes_any_rewriting_of_the_factors(pair):
    """(B R, R^-1 A) with R neither orthogonal nor a permutation; turning alone does not undo it."""
    a, b = pair[0][0], pair[1][0]
    generator = torch.Generator().manual_seed(2)
    mixes = [torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator) for _ in range(3)]
    mixes[0] *= 4
    all_a = torch.stack([torch.linalg.solve(mix, a) for mix in mixes])
    all_b = torch.stack([b @ mix for mix in mixes])
    third = torch.full((3,), 1 / 3)
    found = factorwise.aligned_linear(*stacks(all_a, all_b), third, align="balanced")
    torch.testing.assert_close(found[1] @ found[0], b @ a, rtol=1e-3, atol=1e-3)
    turned = factorwise.aligned_linear(*stacks(all_a, all_b), third)
    for a_mean, b_mean in (turned, (all_a.mean(0), all_b.mean(0))):
        assert (b_mean @ a_mean - b @ a).norm() > 0.3 * (b @ a).norm()


def test_lego_puts_equal_parts_together(pair):
    """Twice the same expert has as many clusters as ranks, each with its own part."""
    a, b = pair[0][:1].expand(2, -1, -1), pair[1][:1].expand(2, -1, -1)
    merged = factorwise.lego(*stacks(a, b), torch.full((2,), 0.5), size=8)
    found, expected = merged[1] @ merged[0], b[0] @ a[0]
    # two members each, in as many clusters: the output weight is sqrt(2 / 8)
    torch.testing.assert_close(found, expected * (2 / 8) ** 0.5, rtol=1e-3, atol=1e-3)
    thrice = factorwise.lego(*stacks(a, b), torch.tensor([2.0, 1.0]), size=8)
    torch.testing.assert_close(thrice[1] @ thrice[0], 3 * found, rtol=1e-3, atol=1e-3)


def test_lego_does_not_care_how_a_rank_is_scaled(pair):
    a, b = pair
    merged = factorwise.lego(*stacks(a, b), ONES / 3, size=6)
    rescaled = factorwise.lego(*stacks(4 * a, b / 4), ONES / 3, size=6)
    torch.testing.assert_close(merged[1] @ merged[0], rescaled[1] @ rescaled[0])


def test_an_unknown_variant_is_named(pair):
    with pytest.raises(ValueError, match="options.variant: must be one of"):
        factorwise.robustmerge(*stacks(*pair), ONES, variant="v4")
    with pytest.raises(ValueError, match="options.align: must be one of"):
        factorwise.aligned_linear(*stacks(*pair), ONES, align="sort")
