"""What must hold for every merging method in core space, whatever the experts: properties over random ones.

A method that breaks an identity by its definition is listed with the reason, and docs/merging_methods.md says so.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.files.peft import site_keys
from moa.merging.adapters import Expert, expert_from_tensors
from moa.merging.merge import merge
from moa.merging.methods.table import METHODS
from moa.statistics.moments import InputSums
from tests.merging.test_merge_sparse import ties_merging

SHAPE = {"layers.0.self_attn.q_proj": (9, 8), "layers.1.self_attn.q_proj": (7, 8)}
TWO_EXPERTS = {"slerp", "sa_merge"}
# not symmetric in the experts: the first is kept elsewhere; axes are turned, or inputs protected, one after the other
ORDERED = {"sa_merge", "aligned_linear", "lego", "nufilt"}
FUNCTIONS_OF_THE_UPDATES = [n for n, m in METHODS.items() if m.spaces[0] != "factor"]
# what gives one expert, at weight 1, back as it is; the others prune, flatten or rescale it by definition
KEEPS_ONE = {
    "linear": {}, "task_arithmetic": {}, "lines": {"first": 1.0}, "karcher": {}, "model_stock": {},
    "ties": {"density": 1.0}, "knots": {"density": 1.0}, "magnitude_prune": {"density": 1.0},
    "dare_linear": {"density": 1.0}, "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "spread": 0.0}, "della_linear": {"density": 1.0, "spread": 0.0},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0}, "breadcrumbs_ties": {"density": 1.0, "outliers": 0.0},
    "consensus": {"at_least": 1}, "tsv_m": {}, "wudi": {}, "dc_merge": {"smooth": "none", "density": 1.0},
    "ctm": {"density": 1.0}, "regmean": {}, "core_regmean": {}, "pico": {}, "score": {}, "tada": {},
    "nufilt": {},
}  # fmt: skip
seeds = st.integers(0, 2**16)
quick = settings(max_examples=2, deadline=None)


def experts_of(seed, count=3, ranks=(2, 3, 1), shapes=SHAPE):
    return [make_expert(f"e{i}", seed + i, ranks[i % len(ranks)], shapes) for i in range(count)]


def make_expert(name, seed, rank, shapes=SHAPE, **config):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, (rows, columns) in shapes.items():
        key_a, key_b = site_keys(site)
        tensors[key_a] = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        tensors[key_b] = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": list(shapes)}
    inputs = {site: moments_of(seed, columns) for site, (_, columns) in shapes.items()}
    return replace(expert_from_tensors(name, tensors, {**settings, **config}), inputs=inputs.__getitem__)


def moments_of(seed, columns, tokens=40):
    """Of inputs that have their own directions, of unequal size."""
    generator = torch.Generator().manual_seed(seed + 1000)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    sums = InputSums()
    sums.add(torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix)
    return sums.sketch(columns, columns)


def update_of(experts, method, **more):
    merged = merge(experts, method=method, **more)
    return {site: result.lora_b @ result.lora_a for site, result in merged.items()}


def assert_equal(found, expected):
    for site in SHAPE:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-7, atol=1e-8)


def rewritten(expert, seed):
    """(B R, R^-1 A): the same updates from other factors."""

    def read(site):
        lora_a, lora_b = expert.read(site)
        generator = torch.Generator().manual_seed(seed)
        rank = lora_a.shape[0]
        mix = torch.randn(rank, rank, generator=generator, dtype=torch.float64) + 2 * torch.eye(rank)
        return torch.linalg.solve(mix, lora_a), lora_b @ mix

    return Expert(**{**vars(expert), "read": read})


@pytest.mark.parametrize("method", [n for n in METHODS if n not in ORDERED])
@quick
@given(seed=seeds)
def test_the_order_of_experts_does_not_matter(method, seed):
    experts = experts_of(seed, 2 if method in TWO_EXPERTS else 3, (2,))
    weights = {expert.name: 0.5 + i for i, expert in enumerate(experts)}
    found = update_of(experts, method, weights=weights, rank="sum")
    assert_equal(update_of(experts[::-1], method, weights=weights, rank="sum"), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "space"), [(n, s) for n in FUNCTIONS_OF_THE_UPDATES for s in METHODS[n].spaces if s != "factor"]
)
@quick
@given(seed=seeds)
def test_how_an_expert_is_factored_does_not_matter(method, space, seed):
    experts = experts_of(seed, 2 if method in TWO_EXPERTS else 3)
    found = update_of(experts, method, space=space)
    others = [rewritten(expert, seed) for expert in experts]
    assert_equal(update_of(others, method, space=space), found)


@pytest.mark.parametrize("method", ("linear", "ties", "wudi", "regmean", "robustmerge"))
def test_any_method_gives_the_mean_norm_of_its_experts_where_asked_to(method):
    """By their weights, at every site; a shared expert is added afterwards; what cancels has no length to give."""
    experts = experts_of(3, 3, (2,))
    weights = {"e0": 1.0, "e1": 0.5, "e2": 0.0}
    found = update_of(experts, method, weights=weights, norm="mean", rank=1)
    norms = [{site: u.norm() for site, u in update_of([e], "linear", weights={e.name: 1.0}).items()} for e in experts]
    for site, update in found.items():
        torch.testing.assert_close(update.norm(), (norms[0][site] + 0.5 * norms[1][site]) / 1.5)
    beside = update_of(experts, method, weights={**weights, "e2": 1.0}, norm="mean", added=["e2"])
    alone = update_of(experts[:2], method, weights={"e0": 1.0, "e1": 0.5}, norm="mean")
    own = update_of(experts[2:], "linear", weights={"e2": 1.0})
    assert_equal(beside, {site: alone[site] + own[site] for site in SHAPE})
    twins = [make_expert("plus", 3, 2), make_expert("minus", 3, 2)]
    if method == "linear":
        none = update_of(twins, method, weights={"plus": 0.7, "minus": -0.7}, norm="mean")
        assert_equal(none, {site: torch.zeros(shape).double() for site, shape in SHAPE.items()})


@pytest.mark.parametrize("method", KEEPS_ONE)
@quick
@given(seed=seeds)
def test_one_expert_of_weight_one_merges_to_itself(method, seed):
    expert = make_expert("alone", seed, 2)
    found = update_of([expert], method, options=KEEPS_ONE[method], weights={"alone": 1.0})
    assert_equal(found, update_of([expert], "linear", weights={"alone": 1.0}))


# the second's directions count, whatever its weight: in the common space, the interference, or the mean
WEIGH_DIRECTIONS = ("wudi", "model_stock", "tsv_m", "dc_merge", "pico", "score")
# masks are drawn for each expert by itself; the arc between opposites has no middle; least squares takes no weight
# below 0; the second's directions are protected; see above
KEEP_A_PAIR = (
    "wudi",
    "karcher",
    "model_stock",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "tsv_m",
    "regmean",
    "core_regmean",
    "nufilt",
)


@pytest.mark.parametrize("method", [n for n in KEEPS_ONE if n not in WEIGH_DIRECTIONS])
@quick
@given(seed=seeds)
def test_weights_one_and_zero_give_the_first_expert(method, seed):
    experts = experts_of(seed, 2)
    options = KEEPS_ONE[method]
    found = update_of(experts, method, options=options, weights={"e0": 1.0, "e1": 0.0})
    assert_equal(found, update_of(experts[:1], "linear", weights={"e0": 1.0}))


@pytest.mark.parametrize("method", [n for n in KEEPS_ONE if n not in KEEP_A_PAIR])
@quick
@given(seed=seeds)
def test_adding_and_subtracting_an_expert_gives_the_base(method, seed):
    twins = [make_expert("plus", seed, 2), make_expert("minus", seed, 2)]
    weights = {"plus": 0.7, "minus": -0.7}
    found = update_of(twins, method, options=KEEPS_ONE[method], weights=weights)
    assert_equal(found, {site: torch.zeros(shape).double() for site, shape in SHAPE.items()})


ONE_SITE = {"layers.0.self_attn.q_proj": (9, 8)}
# space -> the methods that elect there, over so many random experts; knots once failed for 6 of 400
CANCELLING = [
    ("core", ("ties", "breadcrumbs_ties", "ctm", "dc_merge"), 80),
    ("rows", ("ties", "breadcrumbs_ties"), 40),
    ("dense", ("ties", "breadcrumbs_ties"), 40),
]


@pytest.mark.slow
@pytest.mark.parametrize("space, methods, count", [("rows", ("knots",), 400), *CANCELLING])
def test_twins_of_opposite_weights_cancel_in_every_vote(space, methods, count):
    """Also where one is factored in another way: what is left of a vote is the rounding of the whole update."""
    for seed in range(count):
        plus, minus = (make_expert(name, seed, 2, ONE_SITE) for name in ("plus", "minus"))
        twins = [plus, minus if seed % 3 else rewritten(minus, seed)]
        method = methods[seed % len(methods)]
        weights = {"plus": 0.7, "minus": -0.7}
        merged = merge(twins, method=method, space=space, options=KEEPS_ONE[method], weights=weights)
        (site,) = merged.values()
        assert (site.lora_b @ site.lora_a).abs().max() < 1e-8, (method, seed)


@pytest.mark.parametrize("method", FUNCTIONS_OF_THE_UPDATES)
@quick
@given(seed=seeds)
def test_rslora_and_unequal_alphas_are_only_a_scale(method, seed):
    """Rank 4, alpha 6 with rsLoRA has scaling 3; the same factors times 3 with scaling 1 are the same expert."""
    stable = make_expert("e0", seed, 4, lora_alpha=6, use_rslora=True)
    plain = make_expert("e0", seed, 4, lora_alpha=4)

    def tripled(site):
        lora_a, lora_b = plain.read(site)
        return lora_a, 3 * lora_b

    other = make_expert("e1", seed + 1, 2)
    same = Expert(**{**vars(plain), "read": tripled})
    assert_equal(update_of([stable, other], method), update_of([same, other], method))


@pytest.mark.parametrize("method", list(METHODS))
def test_the_number_of_threads_changes_nothing(method):
    experts = experts_of(0, 2, (2,))
    threads, found = torch.get_num_threads(), {}
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found[count] = update_of(experts, method)
    finally:
        torch.set_num_threads(threads)
    assert_equal(found[1], found[2])


def test_ties_over_the_model_trims_all_sites_of_adapters_together():
    experts, options = experts_of(5, 3, (8,)), {"scope": "model", "density": 0.3}
    found = update_of(experts, "ties", options=options, space="dense")
    rows = torch.stack([torch.cat([u.flatten() for u in update_of([e], "linear").values()]) for e in experts])
    expected = ties_merging(rows, 0.3)
    torch.testing.assert_close(torch.cat([u.flatten() for u in found.values()]), expected)
    apart = update_of(experts, "ties", options={"density": 0.3}, space="dense")
    assert any(not torch.allclose(apart[site], found[site]) for site in SHAPE)


def test_factor_space_depends_on_the_factoring_and_says_so():
    experts = experts_of(3, 2, (2,))
    found = update_of(experts, "linear", space="factor")
    others = [rewritten(expert, seed) for seed, expert in enumerate(experts)]
    others = update_of(others, "linear", space="factor")
    assert any(not torch.allclose(found[site], others[site], rtol=0.1) for site in SHAPE)
    with pytest.raises(ValueError, match="space: factor needs one rank for all experts"):
        merge(experts_of(0, 2), method="linear", space="factor")
