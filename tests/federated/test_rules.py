"""Rules of federation: identities of the exact ones, references in loops for the others."""

import math

import pytest
import torch

from moa.federated import rules
from moa.federated.rules import ROBUST, SERVERS, UNWEIGHTED
from moa.merging.methods.table import METHODS

WEIGHTS = [3, 1, 4]


def pairs(*ranks: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in ((r, 9), (7, r))) for r in ranks]


def dense(pair) -> torch.Tensor:
    a, b = (pair.lora_a, pair.lora_b) if hasattr(pair, "lora_a") else pair
    return b @ a


def exact(own, weights=WEIGHTS) -> torch.Tensor:
    return sum(w * dense(pair) for w, pair in zip(weights, own, strict=True)) / sum(weights)


def close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_mean_of_factors_and_the_covariance_are_the_mean_update():
    own = pairs(2, 2, 2)
    close(dense(rules.mean_factors(own, WEIGHTS)) + dense(rules.covariance(own, WEIGHTS)), exact(own))
    left_out = exact(own) - dense(rules.mean_factors(own, WEIGHTS))
    norms = [float(x.square().sum()) for x in (left_out, exact(own))]
    assert rules.covariance_norms(own, WEIGHTS) == pytest.approx(norms) and norms[0] > 0.01 * norms[1]


@pytest.mark.parametrize("common", ["A", "B"])
def test_the_mean_of_factors_is_exact_where_one_factor_is_common(common):
    own = pairs(2, 2, 2)
    own = [(own[0][0], b) if common == "A" else (a, own[0][1]) for a, b in own]
    close(dense(rules.mean_factors(own, WEIGHTS)), exact(own))
    assert rules.covariance_norms(own, WEIGHTS)[0] < 1e-24


def test_which_factor_moves():
    assert [rules.moving_factors("alternate", t) for t in (1, 2, 3)] == ["B", "A", "B"]
    assert rules.moving_factors("freeze_a", 2) == "B" and rules.moving_factors("both", 2) == "AB"
    with pytest.raises(ValueError, match="factors: must be one of"):
        rules.moving_factors("a", 1)


def test_stack_and_svd_at_the_sum_of_unequal_ranks_are_exact():
    own = pairs(2, 1, 3)
    close(dense(rules.stack(own, WEIGHTS)), exact(own))
    low = rules.svd(own, WEIGHTS, 6)
    close(dense(low), exact(own))
    assert low.lost < 1e-18


def test_svd_is_the_best_of_its_rank_and_reports_what_it_lost():
    own = pairs(2, 1, 3)
    u, s, v = torch.linalg.svd(exact(own))
    low = rules.svd(own, WEIGHTS, 2)
    close(dense(low), u[:, :2] * s[:2] @ v[:2])
    assert low.lost == pytest.approx(float(s[2:].square().sum()))


def test_carry_and_mean_are_exact_and_add_to_what_is_carried():
    own, carried = pairs(2, 2, 2), pairs(7, seed=1)[0]
    mean, low = rules.carry(own, WEIGHTS, carried)
    close(dense(mean) + dense(low), exact(own) + dense(carried))
    # the clients' scaling is twice that of the carrying expert
    mean, low = rules.carry(own, WEIGHTS, carried, ratio=2)
    close(2 * dense(mean) + dense(low), 2 * exact(own) + dense(carried))
    assert len(low.lora_a) == 7
    close(dense(rules.fold(own, WEIGHTS, carried, ratio=2)), 2 * exact(own) + dense(carried))


@pytest.mark.parametrize("rule", ["svd", "carry", "stack", "mean_factors"])
def test_one_client_equal_clients_order_and_clients_of_weight_0(rule):
    own = pairs(2, 2, 2)

    def result(pairs_, weights):
        if rule == "carry":
            mean, low = rules.carry(pairs_, weights, (torch.zeros(7, 9).double(), torch.zeros(7, 7).double()))
            return dense(mean) + dense(low)
        more = (7,) if rule == "svd" else ()
        return dense(getattr(rules, rule)(pairs_, weights, *more))

    close(result(own[:1], [5]), dense(own[0]))
    close(result([own[0]] * 3, WEIGHTS), dense(own[0]))
    close(result(own[::-1], WEIGHTS[::-1]), result(own, WEIGHTS))
    close(result(own, [3, 0, 4]), result([own[0], own[2]], [3, 4]))


def test_another_factoring_changes_the_mean_of_factors_alone():
    own = pairs(2, 2, 2)
    r = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    other = [(torch.linalg.inv(r) @ own[0][0], own[0][1] @ r), *own[1:]]
    close(dense(rules.svd(other, WEIGHTS, 4)), dense(rules.svd(own, WEIGHTS, 4)))
    close(dense(rules.stack(other, WEIGHTS)), dense(rules.stack(own, WEIGHTS)))
    assert not torch.allclose(dense(rules.mean_factors(other, WEIGHTS)), dense(rules.mean_factors(own, WEIGHTS)))


def test_an_empty_rank_keeps_its_a_so_that_it_can_learn():
    (a, b), *_ = pairs(3)
    b[:, 1:] = 0
    new_a, new_b = rules.padded(rules.svd([(a, b)] * 2, [1, 1], 3), (a, b))
    close(new_b @ new_a, b @ a)
    assert not new_b[:, 1:].any() and torch.equal(new_a[1:], a[1:])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "core" in row.spaces])
def test_any_merge_of_one_site_in_one_shot(method):
    own = pairs(2, 2, 2)
    two = method in ("slerp", "sa_merge")  # defined for two
    if METHODS[method].reads_inputs or method == "lines":
        with pytest.raises(ValueError, match=f"merge:{method} reads more"):
            rules.merge(own, WEIGHTS, 4, method=method)
        return
    own, weights = (own[:2], WEIGHTS[:2]) if two else (own, WEIGHTS)
    low = rules.merge(own, weights, "sum", method=method)
    assert low.lora_b.shape == (7, 2 * len(own)) and bool(dense(low).isfinite().all())
    if method in ("linear", "task_arithmetic"):
        close(dense(low), exact(own) * (3 if METHODS[method].weights == "ones" else 1))


def test_a_round_of_train_and_merge_adds_the_merged_changes_to_what_all_began_with():
    (start,), own, r = pairs(2, seed=7), pairs(2, 2, 2), torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    change = exact(own) - dense(start)
    for method, times in (("linear", 1), ("task_arithmetic", 3)):
        close(dense(rules.merge(own, WEIGHTS, 7, method=method, start=start)), dense(start) + times * change)
    close(dense(rules.merge(own, WEIGHTS, 2, method="linear", start=start)), dense(rules.svd(own, WEIGHTS, 2)))
    ties = dense(rules.merge(own, WEIGHTS, 7, method="ties", start=start))
    other = (torch.linalg.inv(r) @ start[0], start[1] @ r)
    close(dense(rules.merge([*own], WEIGHTS, 7, method="ties", start=other)), ties)
    for method in ("linear", "ties", "consensus"):  # nobody has moved
        close(dense(rules.merge([other, start], [1, 1], 2, method=method, start=start)), dense(start))
    empty = (start[0], torch.zeros_like(start[1]))
    for method in ("linear", "ties"):  # as a merge after training
        one = rules.merge(own, WEIGHTS, 4, method=method, start=empty)
        assert torch.equal(one.lora_b, rules.merge(own, WEIGHTS, 4, method=method).lora_b)


def test_a_merge_over_all_sites_is_named_and_depth_may_be_given():
    with pytest.raises(ValueError, match="merge:ties reads more"):
        rules.merge(pairs(2, 2), [1, 1], 2, method="ties", options={"scope": "model"})
    assert rules.merge(pairs(2, 2), [1, 1], 2, method="lines", depth=0.5).lora_b.shape == (7, 2)


def test_a_merge_that_is_not_in_core_space_is_named():
    with pytest.raises(ValueError, match="aligned_linear"):
        rules.merge(pairs(2, 2), [1, 1], 2, method="aligned_linear")


def test_server_optimisers_follow_their_papers():
    names = [name for name in SERVERS if name != rules.SCAFFOLD]
    deltas, tau, b1, b2 = [0.5, -0.2, 0.1], 1e-3, 0.9, 0.99
    reference = {name: 0.0 for name in names}
    m = {name: 0.0 for name in names}
    v = {name: tau**2 for name in names}
    x, state = {name: torch.zeros(1).double() for name in names}, {name: {} for name in names}
    for d in deltas:
        m["momentum"] = 0.9 * m["momentum"] + d
        reference["momentum"] += m["momentum"]
        v["adam"] = b2 * v["adam"] + (1 - b2) * d * d
        v["yogi"] -= (1 - b2) * d * d * math.copysign(1, v["yogi"] - d * d)
        v["adagrad"] += d * d
        for name in ("adam", "yogi", "adagrad"):
            m[name] = b1 * m[name] + (1 - b1) * d
            reference[name] += 1e-3 * m[name] / (math.sqrt(v[name]) + tau)
        for name in names:
            step, state[name] = SERVERS[name](torch.tensor([d], dtype=torch.float64), state[name])
            x[name] += step
    for name in names:
        assert float(x[name]) == pytest.approx(reference[name], rel=1e-12), name


def test_momentum_0_is_the_mean_client():
    delta = torch.randn(5)
    assert torch.equal(rules.momentum(delta, {"m": torch.randn(5)}, beta=0)[0], delta)


def test_scaffold_corrects_drift():
    """Two clients of different quadratics: plain averaging ends beside the optimum, SCAFFOLD on it."""
    curvature, centre, lr, steps = (1.0, 4.0), (0.0, 1.0), 0.1, 5
    best = (1.0 * 0.0 + 4.0 * 1.0) / 5.0

    def rounds(scaffold: bool) -> float:
        x, c, own = torch.zeros(1).double(), torch.zeros(1).double(), [torch.zeros(1).double()] * 2
        for _ in range(100):
            ends, changes = [], []
            for k in range(2):
                y = x.clone()
                for _ in range(steps):
                    gradient = curvature[k] * (y - centre[k])
                    y = y - lr * (gradient + c - own[k] if scaffold else gradient)
                new = rules.next_variate(x, y, c, own[k], lr * steps)
                changes.append(new - own[k])
                if scaffold:
                    own[k] = new
                ends.append(y)
            x = sum(ends) / 2
            if scaffold:
                c = rules.scaffold(x, {"c": c, "change": sum(changes)}, clients=2)[1]["c"]
                close(c, sum(own) / 2)
        return float(x)

    assert abs(rounds(False) - best) > 0.05
    assert rounds(True) == pytest.approx(best, abs=1e-9)


def test_a_variate_is_the_mean_gradient_of_the_clients_steps():
    x, c, own, gradients = torch.ones(3).double(), torch.randn(3).double(), torch.randn(3).double(), torch.randn(4, 3)
    y = x.clone()
    for gradient in gradients.double():
        y = y - 0.1 * (gradient + c - own)
    close(rules.next_variate(x, y, c, own, 0.4), gradients.double().mean(0))


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_means_of_equal_updates_are_the_mean(rule):
    row = torch.randn(6).double()
    close(ROBUST[rule](row.repeat(5, 1), torch.tensor([1.0, 2, 3, 4, 5]).double()), row)


@pytest.mark.parametrize("rule", ROBUST)
def test_one_wrong_client_in_seven_moves_no_robust_mean_far(rule):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(7, 6, generator=g, dtype=torch.float64)
    options = {"share": 0.2} if rule == "trimmed_mean" else {}
    values[3] = 1e6
    found = ROBUST[rule](values, torch.ones(7).double(), **options)
    assert found.abs().max() < 3
    turned = ROBUST[rule](values.flip(0), torch.ones(7).double(), **options)
    torch.testing.assert_close(found, turned, rtol=1e-6, atol=1e-6)


def test_medians_and_krum_by_hand():
    values, ones = torch.tensor([[1.0, 0], [2, 0], [9, 4], [4, 2]]), torch.ones(4)
    assert rules.median(values, ones).tolist() == [3, 1] and rules.median(values[:3], ones[:3]).tolist() == [2, 0]
    assert rules.trimmed_mean(values, ones, share=0.25).tolist() == [3, 1]
    line = torch.tensor([[0.0], [1.0], [2.5], [3.0], [50.0]])
    # scores over the 5 - 1 - 2 = 2 nearest: 7.25, 3.25, 2.5, 4.25, ...
    assert rules.krum(line, torch.ones(5)).tolist() == [2.5]
    assert rules.krum(line, torch.ones(5), chosen=2).tolist() == [1.75]
    # of three numbers with weights 1, 1, 3 the weighted median
    found = rules.geometric_median(torch.tensor([[0.0], [1.0], [7.0]]), torch.tensor([1.0, 1.0, 3.0]))
    assert float(found[0]) == pytest.approx(7, abs=1e-3)


def test_robust_options_are_checked():
    with pytest.raises(ValueError, match="options.share: must be a number, below 0.5"):
        rules.trimmed_mean(torch.zeros(3, 1), torch.ones(3), share=0.5)
    with pytest.raises(ValueError, match=r"needs 2 wrong \+ 3 clients, got 4"):
        rules.krum(torch.zeros(4, 1), torch.ones(4))
    with pytest.raises(ValueError, match=r"options.chosen: must be in 1..4"):
        rules.krum(torch.zeros(5, 1), torch.ones(5), chosen=5)


def test_outliers_are_by_the_median_and_its_median_distance_of_logarithms():
    logs = torch.tensor([0.0, 0.1, -0.1, 0.2, 0.9, -3.0])  # median 0.05, distances .05, .05, .15, .15, .85, 3.05
    assert rules.outliers(logs.exp(), 0.85 / (1.4826 * 0.15) + 0.01) == []
    assert rules.outliers(logs.exp(), 0.85 / (1.4826 * 0.15) - 0.01) == [4]
    # however alike the others are, twice the median is near; what did not move is not compared
    assert rules.outliers(torch.tensor([1.0, 1.0, 1.0, 1.9, 0.0, 0.0, 0.0]), 5) == []
    assert rules.outliers(torch.tensor([1.0, 1.0, 1.0, 2.1, 0.0, 0.0, 0.0]), 5) == [3]
    assert rules.outliers(torch.tensor([1.0, 1e9]), 5) == []


def test_clipping_bounds_the_norm():
    delta = torch.tensor([3.0, 4.0])
    assert (delta * rules.shrink(5.0, 1.0)).norm() == 1 and rules.shrink(5.0, 6.0) == rules.shrink(0.0, 6.0) == 1


def test_nearest_clients_share_what_is_not_a_clients_own():
    apart = torch.tensor([[0.0, 1, 2, 9], [1, 0, 3, 9], [2, 3, 0, 9], [9, 9, 9, 0]])
    found = rules.nearest_weights(apart, own=0.4, nearest=2)
    torch.testing.assert_close(found[0], torch.tensor([0.4, 0.4, 0.2, 0.0]))
    torch.testing.assert_close(found.sum(1), torch.ones(4))
    assert torch.equal(rules.nearest_weights(torch.zeros(1, 1)), torch.eye(1))
    # clients that are equal
    torch.testing.assert_close(rules.nearest_weights(torch.zeros(3, 3)).sum(1), torch.ones(3))


def test_the_rules_that_read_no_weights_read_none():
    values = torch.randn(5, 3)
    for name, rule in ROBUST.items():
        same = torch.equal(rule(values, torch.ones(5)), rule(values, torch.tensor([1.0, 9, 1, 1, 1])))
        assert same == (name in UNWEIGHTED)
