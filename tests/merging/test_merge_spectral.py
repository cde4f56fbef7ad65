"""Spectral merging in core space equals the published formula on the dense updates, where that is well posed."""

import pytest
import torch

from moa.merging.core import to_core
from moa.merging.methods import spectral
from moa.merging.methods.stack import stack_of
from moa.merging.methods.table import METHODS

NAMES = ("one", "two", "three")
ONES = torch.ones(3, dtype=torch.float64)
MIXED = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
RANKS = (2, 3, 2)


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [(normal(rank, 19), normal(23, rank)) for rank in RANKS]


@pytest.fixture
def updates(factors):
    return torch.stack([b @ a for a, b in factors])


def in_core(method, factors, weights=ONES, **options):
    """The method on the core matrices, back in the original space."""
    core = to_core(factors)
    stack = stack_of(site="q", experts=NAMES, matrices=core.cores, ranks=RANKS)
    return core.q_b @ method(stack, weights, **options) @ core.q_a.T


def top(matrix, count):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :count], s[:count], v[:count]


def whiten(matrix):
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def test_tsv_m_is_the_published_formula_on_the_dense_updates(factors, updates):
    """Gargiulo et al. 2025, equations 4 to 6, with the experts' ranks as k."""
    parts = [top(m, r) for m, r in zip(updates, RANKS, strict=True)]
    u = whiten(torch.cat([p[0] for p in parts], 1))
    v = whiten(torch.cat([p[2] for p in parts]))
    for weights in (ONES, MIXED):
        s = torch.cat([w * p[1] for w, p in zip(weights, parts, strict=True)])
        torch.testing.assert_close(in_core(spectral.tsv_m, factors, weights), u @ torch.diag(s) @ v)


def test_twins_have_the_directions_of_one(factors, updates):
    """Half the directions of their common space are rounding, which neither method may raise to a singular value."""
    twins = [factors[0]] * 3
    torch.testing.assert_close(in_core(spectral.tsv_m, twins), updates[0])
    u, s, v = top(3 * updates[0], 2)
    torch.testing.assert_close(in_core(spectral.iso_c, twins), s.mean() * u @ v)
    torch.testing.assert_close(in_core(spectral.iso_cts, twins), s.mean() * u @ v)


def test_tsv_m_may_keep_a_share_of_each_expert(factors, updates):
    parts = [top(m, 1) for m in updates]
    u = whiten(torch.cat([p[0] for p in parts], 1))
    v = whiten(torch.cat([p[2] for p in parts]))
    expected = u @ torch.diag(torch.cat([p[1] for p in parts])) @ v
    torch.testing.assert_close(in_core(spectral.tsv_m, factors, share=0.5), expected)


def test_iso_c_has_one_singular_value(factors, updates):
    u, s, v = top((MIXED[:, None, None] * updates).sum(0), sum(RANKS))
    torch.testing.assert_close(in_core(spectral.iso_c, factors, MIXED), s.mean() * u @ v)


def test_iso_cts_is_the_published_formula_over_the_numerical_rank(factors, updates):
    """Marczak et al. 2025, algorithm 2: 7 directions, of which 4 are common and each expert adds one."""
    weighted = MIXED[:, None, None] * updates
    u, s, v = top(weighted.sum(0), 4)
    own = [top(m - u @ (u.T @ m), 1) for m in weighted]
    all_u = whiten(torch.cat([*(p[0] for p in own), u], 1))
    all_v = whiten(torch.cat([*(p[2] for p in own), v]))
    mean = torch.cat([*(p[1] for p in own), s]).mean()
    found = in_core(spectral.iso_cts, factors, MIXED, common=0.6)
    torch.testing.assert_close(found, mean * all_u @ all_v)


def interference(merged, updates):
    return sum(((merged - m) @ m.T).square().sum() / m.square().sum() for m in updates)


def test_wudi_is_where_the_gradient_vanishes(factors, updates):
    merged = in_core(spectral.wudi, factors).requires_grad_()
    (gradient,) = torch.autograd.grad(interference(merged, updates), merged)
    assert gradient.abs().max() < 1e-9
    assert interference(merged, updates) < interference(updates.sum(0), updates)


def test_wudi_weighs_experts_that_share_directions_by_their_energy():
    """Full matrices of other sizes: no merge fits all of them, and the least interference is a compromise."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)[:, None, None]
    matrices = sizes * torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    merged = spectral.wudi(stack_of(site="q", experts=NAMES, matrices=matrices), ONES)
    merged.requires_grad_()
    loss = interference(merged, matrices)
    (gradient,) = torch.autograd.grad(loss, merged)
    assert loss > 0.1 and gradient.abs().max() < 1e-9


@pytest.mark.slow
def test_wudi_for_a_time_is_that_much_gradient_descent(factors, updates):
    found = in_core(spectral.wudi, factors, MIXED, time=0.05)
    merged, steps = (MIXED[:, None, None] * updates).sum(0), 4000
    for _ in range(steps):
        merged = merged.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(interference(merged, updates), merged)
        merged = merged - 0.05 / steps * gradient
    torch.testing.assert_close(found, merged.detach(), rtol=1e-3, atol=1e-3)


def test_wudi_without_lengths_is_the_closed_form_of_actmerge(factors, updates):
    wanted, gram = sum(m @ m.T @ m for m in updates), sum(m.T @ m for m in updates)
    expected = wanted @ torch.linalg.pinv(gram, rtol=1e-9)
    torch.testing.assert_close(in_core(spectral.wudi, factors, normalise=False), expected)


def test_wudi_along_leading_directions_keeps_the_sum_along_the_others(factors, updates):
    """ASWUDI: of the interference's 7 eigenvalues, as many directions as ceil((sum of roots)^2 / sum)."""
    factors = [(a * 0.1 ** torch.arange(len(a))[:, None], b) for a, b in factors]
    updates = torch.stack([b @ a for a, b in factors])
    share = 1 / updates.square().sum((1, 2))
    values, axes = torch.linalg.eigh(torch.einsum("e,erc,erd->cd", share, updates, updates))
    count = int(torch.ceil(values.clamp(min=0).sqrt().sum() ** 2 / values.sum()))
    assert 0 < count < 7
    leading = axes[:, -count:] @ axes[:, -count:].T
    total = (MIXED[:, None, None] * updates).sum(0)
    expected = in_core(spectral.wudi, factors) @ leading + total - total @ leading
    torch.testing.assert_close(in_core(spectral.wudi, factors, MIXED, directions="leading"), expected)


def test_pico_shortens_a_direction_by_the_energy_that_all_experts_have_there(factors, updates):
    """As the released code on factors U S and V^T: singular values of all left factors side by side."""
    left = torch.cat([top(m, r)[0] * top(m, r)[1] for m, r in zip(updates, RANKS, strict=True)], 1)
    u, s, _ = torch.linalg.svd(left, full_matrices=False)
    alpha = 1 / (1 + 2 * s.square() / s.square().sum())
    even = updates + u @ torch.diag(alpha - 1) @ u.T @ updates
    torch.testing.assert_close(in_core(spectral.pico, factors, MIXED), (MIXED[:, None, None] * even).sum(0))
    again = [(torch.linalg.svd(m)[2][:7], torch.linalg.svd(m)[0][:, :7] * torch.linalg.svd(m)[1][:7]) for m in even]
    for then in ("ties", "tsv_m"):
        found = in_core(spectral.pico, factors, MIXED, then=then)
        assert found.isfinite().all() and (found - in_core(spectral.pico, factors, MIXED)).norm() > 0.1
    cut = [(a[:r], b[:, :r]) for (a, b), r in zip(again, RANKS, strict=True)]
    torch.testing.assert_close(
        in_core(spectral.pico, factors, MIXED, then="tsv_m"), in_core(spectral.tsv_m, cut, MIXED)
    )


def test_score_trims_what_two_directions_do_together_and_never_a_direction_itself(factors, updates):
    parts = [top(m, r) for m, r in zip(updates, RANKS, strict=True)]
    u, v = whiten(torch.cat([p[0] for p in parts], 1)), whiten(torch.cat([p[2] for p in parts]))
    expected = torch.zeros_like(updates[0])
    for weight, own in zip(MIXED, updates, strict=True):
        inside = u.T @ own @ v.T
        off = [inside[i, j] for i in range(7) for j in range(7) if i != j]
        spread = (sum(x**2 for x in off) / len(off)) ** 0.5
        for i in range(7):
            for j in range(7):
                if i != j and abs(inside[i, j]) >= 1.2 * spread:
                    inside[i, j] = 0
        expected += weight * (u @ inside @ v)
    torch.testing.assert_close(in_core(spectral.score, factors, MIXED, deviations=1.2), expected)
    everything = in_core(spectral.score, factors, MIXED, deviations=1e9)
    torch.testing.assert_close(everything, (MIXED[:, None, None] * updates).sum(0))


def test_ct_merge_gives_experts_of_their_own_directions_the_mean_square_of_their_values():
    """Two experts without a common direction: each keeps its directions, at one value; a third of it doubles that."""
    eye = torch.eye(6, dtype=torch.float64)
    first, second = (eye[:, :2] * torch.tensor([3.0, 1.0])) @ eye[:2], 5 * eye[:, 2:3] @ eye[2:3]
    for matrices, values in (
        ([first, second], [5**0.5, 5**0.5, 5.0]),
        ([first, second, second], [5**0.5, 5**0.5, 10.0]),
    ):
        names = ("a", "b", "c")[: len(matrices)]
        ranks = (2, 1, 1)[: len(matrices)]
        stack = stack_of(site="q", experts=names, matrices=torch.stack(matrices), ranks=ranks)
        merged = spectral.ct_merge(stack, torch.ones(len(matrices)).double(), size=3)
        torch.testing.assert_close(merged.diagonal()[:3], torch.tensor(values).double())
        assert merged.square().sum() == pytest.approx(sum(v**2 for v in values))


@pytest.mark.parametrize("weights", [ONES, MIXED])
def test_nufilt_is_where_the_released_loss_has_its_minimum(factors, updates, weights):
    """By gradient descent on the projector's addition, from none, for each task after the first."""
    expected = weights[0] * updates[0]
    for weight, update in zip(weights[1:], updates[1:], strict=True):
        task = weight * update
        before, own = (top(m, 2)[2].T for m in (expected, task))
        keeps = torch.eye(19, dtype=task.dtype) - before @ before.T
        added = torch.zeros(19, 19, dtype=task.dtype)
        rate = 1 / (
            2 * torch.linalg.matrix_norm(task, 2) ** 2 * torch.linalg.matrix_norm(torch.cat([own, before], 1), 2) ** 2
        )
        for _ in range(600):
            merged = expected + task @ (keeps + added)
            added = added + 2 * rate * task.T @ (
                (task - merged) @ own @ own.T + (expected - merged) @ before @ before.T
            )
        expected = expected + task @ (keeps + added)
    torch.testing.assert_close(in_core(spectral.nufilt, factors, weights, protected=2, own=2), expected)


def test_nufilt_adds_up_updates_that_read_other_inputs(factors):
    apart = [(torch.eye(19, dtype=a.dtype)[4 * i : 4 * i + len(a)], b) for i, (a, b) in enumerate(factors)]
    torch.testing.assert_close(in_core(spectral.nufilt, apart), sum(b @ a for a, b in apart))


def test_dc_merge_is_the_released_procedure(factors, updates):
    parts = [top(m, r) for m, r in zip(updates, RANKS, strict=True)]
    u = whiten(torch.cat([p[0] for p in parts], 1))
    v = whiten(torch.cat([p[2] for p in parts]))
    cores = torch.stack([u.T @ p[0] @ p[2] @ v.T * p[1].mean() for p in parts])
    kept = torch.where(cores.abs() >= cores.abs().flatten(1).kthvalue(49 - 24).values[:, None, None], cores, 0.0)
    kept = MIXED[:, None, None] * kept
    sign = kept.sum(0).sign()
    agrees = (kept.sign() == sign) & (kept != 0)
    total = (MIXED.abs()[:, None, None] * agrees).sum(0)
    merged = torch.where(agrees, kept, 0.0).sum(0) / torch.where(total > 0, total, 1.0)
    blocks = torch.block_diag(*[torch.ones(r, r, dtype=torch.float64) for r in RANKS])
    expected = u @ (merged * blocks) @ v
    found = in_core(spectral.dc_merge, factors, MIXED, density=0.5)
    torch.testing.assert_close(found, expected)


def test_levelled_singular_values_keep_their_sum():
    s = torch.tensor([8.0, 4.0, 1.0])
    assert spectral._levelled(s, "mean").tolist() == pytest.approx([13 / 3] * 3)
    line = spectral._levelled(s, "linear")
    assert line.sum() == pytest.approx(13) and line[0] / line[-1] == pytest.approx(5)
    assert spectral._levelled(s, "none") is s
    flat = torch.tensor([3.0, 2.0])  # the ratio of the line is at most their own
    assert spectral._levelled(flat, "linear").tolist() == pytest.approx([3.0, 2.0])


def test_ctm_at_full_size_and_density_is_the_mean_of_what_agrees(factors, updates):
    """With the whole space and one expert, nothing is lost."""
    one = in_core(spectral.ctm, factors, weights=ONES * torch.tensor([1, 0, 0]), size=7, density=1.0)
    torch.testing.assert_close(one, updates[0])


def test_ctm_hears_every_expert_alike_where_it_is_asked_to(factors):
    """At even=1 the subspace does not depend on an expert's size, at 0 it does."""
    louder = [(a, 30 * b if i == 0 else b) for i, (a, b) in enumerate(factors)]
    second = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    for even in (0.0, 1.0):
        options = {"size": 3, "density": 1.0, "even": even}
        found, other = (in_core(spectral.ctm, f, second, **options) for f in (factors, louder))
        assert torch.allclose(found, other, rtol=1e-4, atol=1e-4) == (even == 1)


def test_ctm_keeps_the_rank_and_most_of_the_energy(factors, updates):
    merged = in_core(spectral.ctm, factors, size=3, density=1.0, reduce="sum")
    assert torch.linalg.matrix_rank(merged, rtol=1e-8) == 3
    core = to_core(factors).cores
    u = spectral._principal(core, 3)
    assert (u.T @ core).square().sum() > 0.5 * core.square().sum()


def test_ctm_refines_its_subspace_until_it_holds_the_most(factors):
    """One expert at a time, nothing pruned: what is left of all of them is the energy inside the subspace."""

    def held(iterations):
        alone = torch.eye(3, dtype=torch.float64)
        options = {"size": 2, "density": 1.0, "reduce": "sum", "iterations": iterations}
        return sum(in_core(spectral.ctm, factors, w, **options).square().sum() for w in alone)

    assert held(50) > 1.0001 * held(1)
    torch.testing.assert_close(held(50), held(500), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.module == "spectral"])
def test_an_expert_of_zeros_changes_nothing_but_does_no_harm(factors, name):
    method = METHODS[name].function
    zero = [*factors[:2], (factors[2][0], torch.zeros_like(factors[2][1]))]
    assert torch.isfinite(in_core(method, zero)).all()
    nothing = [(a, torch.zeros_like(b)) for a, b in factors]
    assert in_core(method, nothing).abs().max() == 0


def test_an_expert_without_an_update_leaves_the_subspace_of_ctm_to_the_others():
    matrices = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0
    stack = stack_of(site="q", experts=("a", "b", "c"), matrices=matrices)
    merged = spectral.ctm(stack, torch.ones(3), even=1.0)
    assert merged.isfinite().all() and merged.any()
