"""Least squares on the experts' inputs, and the rank that is cut by output energy: against plain solutions."""

from dataclasses import replace

import pytest
import torch

from moa.merging import core
from moa.merging.merge import merge
from moa.statistics.moments import InputSums
from tests.merging.test_merge_identities import ONE_SITE, SHAPE, experts_of, make_expert

(SITE,) = ONE_SITE
ROWS, COLS = ONE_SITE[SITE]
METHODS = ("regmean", "core_regmean")


def rows_of(expert, seed, tokens=60):
    """Inputs of one expert, in some directions more than in others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLS, COLS, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, COLS, generator=generator, dtype=torch.float64) @ mix


def with_rows(experts, rows, directions=COLS):
    """The experts with the moments of given inputs, [token, in] each."""
    found = []
    for expert, own in zip(experts, rows, strict=True):
        sums = InputSums()
        sums.add(own)
        moments = sums.sketch(COLS, directions)
        found.append(replace(expert, inputs=lambda site, moments=moments: moments))
    return found


def world(seed=0, count=3):
    experts = experts_of(seed, count, shapes=ONE_SITE)
    rows = [rows_of(expert, seed + k) for k, expert in enumerate(experts)]
    return with_rows(experts, rows), rows, [dense(e) for e in experts]


def dense(expert):
    a, b = expert.factors(SITE, torch.float64)
    return b @ a


def update(experts, method, **more):
    result = merge(experts, method=method, **more)[SITE]
    return result.lora_b @ result.lora_a


def test_regmean_is_the_least_squares_layer():
    experts, rows, updates = world()
    weights = {"e0": 0.5, "e1": 2.0, "e2": 1.0}
    found = update(experts, "regmean", options={"ridge": 0.0}, weights=weights)
    x = torch.cat([w**0.5 * own for w, own in zip(weights.values(), rows, strict=True)])
    y = torch.cat([w**0.5 * own @ u.T for w, own, u in zip(weights.values(), rows, updates, strict=True)])
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution.T)


def test_core_regmean_is_least_squares_over_updates_of_the_experts_rows():
    experts, rows, updates = world()
    experts = with_rows(experts[:2], rows[:2])  # of ranks 2 and 3, so that the core is smaller than the layer
    axes = torch.linalg.qr(torch.cat([e.factors(SITE, torch.float64)[0] for e in experts]).T).Q
    x = torch.cat(rows[:2]) @ axes
    y = torch.cat([own @ u.T for own, u in zip(rows[:2], updates[:2], strict=True)])
    expected = torch.linalg.lstsq(x, y).solution.T @ axes.T
    torch.testing.assert_close(update(experts, "core_regmean", options={"ridge": 0.0}), expected)
    full = update(experts, "regmean", options={"ridge": 0.0})
    more = update(experts, "core_regmean", options={"ridge": 0.0, "directions": COLS})
    torch.testing.assert_close(more, full)  # with all directions the core is the layer
    assert (full - expected).norm() > 0.01 * full.norm()


@pytest.mark.parametrize("method", METHODS)
def test_equal_round_inputs_give_the_weighted_mean_at_any_ridge(method):
    experts, _, updates = world()
    experts = with_rows(experts, [3 * torch.eye(COLS).double()] * 3)
    expected = (0.5 * updates[0] + 2 * updates[1] + updates[2]) / 3.5
    for ridge in (0.0, 0.3):
        weights = {"e0": 0.5, "e1": 2.0, "e2": 1.0}
        found = update(experts, method, options={"ridge": ridge}, weights=weights)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_read_their_own_inputs_alone_are_summed(method):
    """Expert k reads coordinates of its own, and has inputs nowhere else."""
    experts = [make_expert(f"e{k}", k, 2, ONE_SITE) for k in range(2)]
    own, rows = [], []
    for k, expert in enumerate(experts):
        mask = torch.zeros(COLS).double()
        mask[4 * k : 4 * k + 4] = 1
        lora_a, lora_b = expert.read(SITE)
        own.append(replace(expert, read=lambda site, a=lora_a * mask, b=lora_b: (a, b)))
        rows.append(rows_of(expert, k) * mask)
    found = update(with_rows(own, rows), method, options={"ridge": 0.0})
    torch.testing.assert_close(found, dense(own[0]) + dense(own[1]))


def test_shrinking_keeps_the_diagonal_and_the_ridge_gives_the_mean_where_no_input_is():
    experts, rows, updates = world(count=2)
    found = update(experts, "regmean", options={"nondiagonal": 0.25, "ridge": 0.1})
    moments = [own.T @ own / len(own) for own in rows]
    moments = [0.25 * m + 0.75 * torch.diag(m.diagonal()) for m in moments]
    moments = [m + 0.1 * sum(moments).trace() / (2 * COLS) * torch.eye(COLS) for m in moments]
    expected = sum(u @ m for u, m in zip(updates, moments, strict=True)) @ torch.linalg.inv(sum(moments))
    torch.testing.assert_close(found, expected)
    one = torch.eye(COLS).double()[:1]
    found = update(with_rows(experts, [one, one]), "regmean", options={"ridge": 1e-3})
    torch.testing.assert_close(found, (updates[0] + updates[1]) / 2)


def test_streaming_by_recursive_least_squares_is_regmean_on_all_of_them():
    """MAny: P = (sum C)^-1 and V = sum M C, updated by each expert's own statistics; the stored moments do the same."""
    experts, rows, updates = world()
    ridge = 1e-3 * torch.eye(COLS).double()
    inverse, total = torch.linalg.inv(ridge), torch.zeros(ROWS, COLS).double()
    for own, update_ in zip(rows, updates, strict=True):
        x = own / len(own) ** 0.5  # C = x^T x
        inverse = inverse - inverse @ x.T @ torch.linalg.inv(torch.eye(len(x)) + x @ inverse @ x.T) @ x @ inverse
        total = total + update_ @ x.T @ x
    level = float(sum(own.square().sum() / len(own) for own in rows)) / (3 * COLS)
    found = update(experts, "regmean", options={"ridge": 1e-3 / (3 * level)})
    mean = sum(updates) / 3  # of the ridge in both sums
    torch.testing.assert_close(found, total @ inverse + 1e-3 * mean @ inverse, rtol=1e-6, atol=1e-8)


def test_tada_gates_by_the_answer_to_an_experts_own_inputs_whatever_its_size():
    experts, rows, updates = world(count=2)
    gain = [float((own @ u.T).norm() / len(own) ** 0.5 / u.norm()) for own, u in zip(rows, updates, strict=True)]
    expected = (gain[0] * updates[0] + gain[1] * updates[1]) / sum(gain)
    torch.testing.assert_close(update(experts, "tada", options={"conflict": 1.0}), expected)
    twins = [replace(experts[0], name="one"), replace(experts[0], name="other")]
    weights = {"one": 1.0, "other": -0.7}
    found = update(twins, "tada", options={"conflict": 0.8}, weights=weights)
    torch.testing.assert_close(found, updates[0] / 1.7)  # 0.7 of the first is undone, all of the second


def test_balance_counts_every_experts_outputs_alike():
    experts, rows, updates = world(count=2)
    loud = with_rows(experts, [100 * rows[0], rows[1]])
    options = {"ridge": 0.0, "balance": True}
    torch.testing.assert_close(update(loud, "regmean", options=options), update(experts, "regmean", options=options))
    energies = [(own @ u.T).square().sum() / len(own) for own, u in zip(rows, updates, strict=True)]
    weights = {f"e{k}": float(u.square().sum() / e) for k, (u, e) in enumerate(zip(updates, energies, strict=True))}
    expected = update(experts, "regmean", options={"ridge": 0.0}, weights=weights)
    torch.testing.assert_close(update(experts, "regmean", options=options), expected)


def test_worst_task_weights_lower_the_largest_relative_error():
    experts, rows, updates = world(count=3)
    rows = [rows[0], 10 * rows[1], rows[2]]
    experts = with_rows(experts, rows)

    def worst(**options):
        found = update(experts, "core_regmean", options=options)
        return max(
            float((own @ (found - u).T).square().sum() / (own @ u.T).square().sum())
            for own, u in zip(rows, updates, strict=True)
        )

    assert worst(worst=2.0) < 0.5 * worst()


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_the_site_has_no_part_in_it(method):
    there, away = make_expert("there", 0, 2), make_expert("away", 1, 2, {"layers.1.self_attn.q_proj": (7, COLS)})
    found = merge([there, away], method=method)[SITE]
    torch.testing.assert_close(found.lora_b @ found.lora_a, dense(there))


def test_what_least_squares_cannot_use_is_refused_by_name():
    experts, rows, _ = world(count=2)
    blind = replace(experts[1], inputs=None)
    none = replace(experts[1], inputs=lambda site: InputSums().sketch(COLS, 2))
    few = with_rows(experts, [own[:2] for own in rows])
    cases = (
        ([experts[0], blind], {}, "e1 has no statistics of its inputs; python -m scripts.statistics"),
        ([experts[0], none], {}, f"{SITE}: no token of the expert e1 reached it"),
        (few, {"options": {"ridge": 0.0}}, rf"ridge: 0.0 leaves directions open that no input at {SITE} has"),
        (experts, {"weights": {"e0": 1.0, "e1": -1.0}}, "weights: of least squares must be 0 or more"),
        (experts, {"options": {"ridge": -1.0}}, "options.ridge: of least squares must be 0 or more"),
        (experts, {"method": "linear", "metric": "inputs"}, "metric: inputs has no effect with rank=sum"),
    )
    for given, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            merge(given, **{"method": "regmean", **settings})


# The rank -----------------------------------------------------------------------------------------


def output_error(matrix, other, rows):
    return sum(float((own @ (matrix - other).T).square().sum()) / len(own) for own in rows)


@pytest.mark.parametrize(
    ("method", "space"), [("linear", "core"), ("ties", "rows"), ("ties", "dense"), ("linear", "factor")]
)
def test_the_cut_by_output_is_the_best_of_its_rank_on_the_inputs(method, space):
    """Against the leading part of M C^(1/2), the closed form of reduced-rank regression, in every space."""
    experts = [make_expert(f"e{k}", k, 3, ONE_SITE) for k in range(3)]
    rows = [rows_of(expert, k) for k, expert in enumerate(experts)]
    experts = with_rows(experts, rows)
    settings = {"method": method, "space": space, "weights": {e.name: 1.0 for e in experts}}
    whole = update(experts, rank="sum", **settings) if space != "dense" else update(experts, rank=ROWS, **settings)
    result = merge(experts, rank=2, metric="inputs", **settings)[SITE]
    found = result.lora_b @ result.lora_a
    values, vectors = torch.linalg.eigh(sum(own.T @ own / len(own) for own in rows))
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(whole @ root)
    expected = u[:, :2] * s[:2] @ v[:2] @ torch.linalg.inv(root)
    torch.testing.assert_close(found, expected)
    assert result.lora_a.shape == (2, COLS)
    assert result.lost == pytest.approx(output_error(found, whole, rows))
    assert result.kept == pytest.approx(float(s[:2].square().sum()))
    by_weights = update(experts, rank=2, **settings)
    assert output_error(found, whole, rows) < output_error(by_weights, whole, rows)


def test_round_inputs_cut_as_the_weights_do_and_a_full_rank_cuts_nothing():
    experts, _, _ = world()
    round_inputs = with_rows(experts, [torch.eye(COLS).double()] * 3)
    torch.testing.assert_close(
        update(round_inputs, "linear", rank=2, metric="inputs"), update(experts, "linear", rank=2)
    )
    torch.testing.assert_close(update(experts, "linear", rank=ROWS, metric="inputs"), update(experts, "linear"))


def test_a_share_of_energy_is_one_of_the_outputs():
    experts, rows, _ = world()
    updates = core.to_core([e.factors(SITE, torch.float64) for e in experts])
    merged, metric = updates.cores.sum(0), updates.q_a.T @ (rows[0].T @ rows[0]) @ updates.q_a
    values = torch.linalg.eigvalsh(merged @ metric @ merged.T).flip(0)
    share = float(values[:2].sum() / values.sum())
    low = core.compress(updates, merged, f"energy:{share - 1e-6}", 6, metric)
    assert low.lora_a.shape[0] == 2 and low.kept / (low.kept + low.lost) == pytest.approx(share)


def test_the_sites_shapes_of_this_page_are_those_of_the_identities():
    assert SHAPE[SITE] == (ROWS, COLS)
