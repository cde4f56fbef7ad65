"""Coefficients of the linear methods, against their published formulas on flat vectors."""

import math

import pytest
import torch

from moa.merging.merge import merge
from moa.merging.methods import linear
from moa.merging.methods.stack import stack_of
from moa.merging.site_plan import find_depths, make_plan, sum_gates
from tests.merging.test_merge_identities import experts_of, make_expert, update_of

NAMES = ("one", "two", "three")


@pytest.fixture
def matrices():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stack(matrices, site="layers.0.q_proj", **more):
    return stack_of(site=site, experts=NAMES[: len(matrices)], matrices=matrices, **more)


def weights(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("way", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_shoemakes_formula(matrices, way):
    one, two = matrices[:2]
    angle = torch.arccos((one * two).sum() / one.norm() / two.norm())
    expected = (torch.sin((1 - way) * angle) * one + torch.sin(way * angle) * two) / angle.sin()
    found = linear.slerp(stack(matrices[:2]), weights(2 - 2 * way, 2 * way))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("length", [3.0, -3.0, 0.0])
def test_slerp_of_parallel_opposite_or_empty_updates_is_a_line(matrices, length):
    pair = torch.stack([matrices[0], length * matrices[0]])
    found = linear.slerp(stack(pair), weights(1.5, 0.5))  # a quarter of the way
    torch.testing.assert_close(found, (0.75 + 0.25 * length) * matrices[0])


def test_the_karcher_mean_of_two_is_the_middle_of_their_arc(matrices):
    pair = matrices[:2]
    found = linear.karcher(stack(pair), weights(0.5, 0.5))
    middle = sum(m / m.norm() for m in pair)
    expected = middle / middle.norm() * sum(m.norm() for m in pair) / 2
    torch.testing.assert_close(found, expected)


def test_at_the_karcher_mean_the_pulls_cancel(matrices):
    share = weights(0.5, 0.3, 0.2)
    found = linear.karcher(stack(matrices), 4 * share).flatten()
    mean = found / found.norm()
    pull = torch.zeros_like(mean)
    for part, vector in zip(share, matrices.flatten(1), strict=True):
        unit = vector / vector.norm()
        tangent = unit - (unit @ mean) * mean
        pull += part * torch.arccos(unit @ mean) * tangent / tangent.norm()
    assert pull.norm() < 1e-7
    norms = matrices.flatten(1).norm(dim=1)
    assert float(found.norm()) == pytest.approx(float(share @ norms))


def test_an_empty_update_has_no_direction_and_no_say_in_the_karcher_mean(matrices):
    pair = torch.stack([matrices[0], 0 * matrices[0]])
    torch.testing.assert_close(linear.karcher(stack(pair), weights(0.3, 0.7)), matrices[0])
    assert linear.karcher(stack(0 * pair), weights(0.3, 0.7)).eq(0).all()


def test_opposites_have_no_karcher_mean(matrices):
    pair = torch.stack([matrices[0], -matrices[0]])
    with pytest.raises(ValueError, match="opposite"):
        linear.karcher(stack(pair), weights(0.5, 0.5))


def test_model_stock_scales_the_mean_by_the_experts_agreement(matrices):
    flat = matrices.flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(3) for j in range(i)]
    cosine = sum(pairs) / 3
    ratio = 3 * cosine / (1 + 2 * cosine)
    found = linear.model_stock(stack(matrices), weights(0.5, 0.25, -1.0))
    expected = 0.5 * matrices[0] + 0.25 * matrices[1] - matrices[2]
    torch.testing.assert_close(found, ratio * expected)


def test_lines_grows_with_depth(matrices):
    for depth, scale in ((0.0, 0.2), (0.5, 0.6), (1.0, 1.0)):
        found = linear.lines(stack(matrices, depth=depth), weights(1, 1, -2), first=0.2)
        torch.testing.assert_close(found, scale * (matrices[0] + matrices[1] - 2 * matrices[2]))
        half = linear.lines(stack(matrices, depth=depth), weights(1, 1, -2), first=0.1, last=0.5)
        torch.testing.assert_close(half, found / 2)


def test_sa_merge_mixes_at_the_named_sites_only(matrices):
    pair, both = matrices[:2], weights(1, -2)
    found = linear.sa_merge(stack(pair, depth=0.25), both, share=0.64, decay=2.0)
    torch.testing.assert_close(found, 0.8 * pair[0] - 2 * 0.2 * pair[1])
    other = linear.sa_merge(stack(pair, site="layers.0.up_proj", depth=0.5), both)
    torch.testing.assert_close(other, pair[0])


def test_depth_is_the_place_among_the_numbered_blocks():
    sites = ("a.layers.0.q", "a.layers.4.q", "a.layers.2.q", "b.blocks.1.v", "head")
    assert list(find_depths(sites).values()) == [0.0, 1.0, 0.5, 1.0, 0.0]


def test_a_negative_weight_forgets_and_an_analogy_adds_a_difference():
    experts = experts_of(0, 3, (2,))
    one, two, three = (update_of([e], "linear") for e in experts)
    forgot = update_of(experts[:1], "task_arithmetic", weights={"e0": -1.0})
    analogy = update_of(experts, "task_arithmetic", weights={"e0": 1, "e1": 1, "e2": -1})
    for site in one:
        torch.testing.assert_close(forgot[site], -one[site])
        torch.testing.assert_close(analogy[site], one[site] + two[site] - three[site])


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "lines"])
def test_the_gates_of_a_sum_give_its_update(method):
    """What the live mixture is checked with: gates that make the experts' sum the merged update."""
    experts = experts_of(1, 3, (2,))
    chosen = {"e0": 0.5, "e1": -0.25, "e2": 1.0}
    gates = sum_gates(make_plan(experts, method=method, weights=chosen))
    found = update_of(experts, method, weights=chosen)
    parts = [update_of([e], "linear", weights={e.name: 1.0}) for e in experts]
    for site, row in gates.items():
        expected = sum(g * p[site] for g, p in zip(row, parts, strict=True))
        torch.testing.assert_close(found[site], expected)


def test_what_is_no_sum_has_no_gates():
    experts = experts_of(0, 2, (2,))
    assert sum_gates(make_plan(experts, method="ties")) is None
    assert sum_gates(make_plan(experts, space="factor")) is None


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("slerp", {"e0": 1, "e1": 1, "e2": 1}, "slerp takes two experts, got 3; use karcher"),
        ("sa_merge", {"e0": 1, "e1": 1, "e2": 1}, "sa_merge takes two experts, got 3"),
        ("karcher", {"e0": 1, "e1": -1, "e2": 0}, "must not sum to 0"),
    ],
)
def test_weights_that_a_method_cannot_use_are_refused(method, given, message):
    with pytest.raises(ValueError, match=message):
        merge(experts_of(0, 3), method=method, weights=given)


def test_factor_space_is_pefts_linear():
    """PEFT 0.21: roots of |weight * scaling| on both factors, the sign on A."""
    experts = [make_expert(f"e{i}", i, 2, lora_alpha=6) for i in range(2)]
    chosen = {"e0": 0.7, "e1": -0.4}
    found = update_of(experts, "linear", space="factor", weights=chosen)
    for site, update in found.items():
        a, b = 0.0, 0.0
        for expert in experts:
            lora_a, lora_b = expert.read(site)
            root = math.sqrt(abs(chosen[expert.name]) * 6 / 2)
            a, b = a + math.copysign(root, chosen[expert.name]) * lora_a, b + root * lora_b
        torch.testing.assert_close(update, b @ a)
