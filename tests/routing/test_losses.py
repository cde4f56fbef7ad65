import math

import pytest
import torch

from moa.routing.losses import (
    LOCALITY,
    divergence_loss,
    entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    localized_balancing_loss,
    task_guidance_loss,
    within_task_balancing_loss,
    z_loss,
)


def probs_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("num_experts", [2, 4, 8])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_load_balancing_is_one_at_uniform_use_for_every_k(num_experts, top_k):
    # Each expert is the best for equally many tokens, and has the same mean probability.
    probs = torch.stack([torch.arange(num_experts).roll(i) for i in range(num_experts)]).float()
    loss = load_balancing_loss(probs.softmax(-1)[None], top_k)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_load_balancing_of_a_collapsed_router_is_the_number_of_experts():
    probs = torch.zeros(1, 6, 4)
    probs[..., 2] = 1
    assert load_balancing_loss(probs).item() == 4
    assert load_balancing_loss(probs, top_k=1).item() == 4


def test_load_balancing_equals_the_formula_by_hand():
    probs = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.1, 0.3]]])
    share, mean = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.65, 0.15, 0.2])
    expected = 3 * (share * mean).sum()
    torch.testing.assert_close(load_balancing_loss(probs, top_k=2), expected)


def test_the_gradient_of_load_balancing_moves_towards_uniform():
    logits = torch.tensor([[[2.0, 0.0, 0.0]]]).repeat(1, 5, 1).requires_grad_()
    for top_k in (None, 1, 2):
        logits.grad = None
        load_balancing_loss(logits.softmax(-1), top_k).backward()
        assert (logits.grad[..., 0] > 0).all()


LOSSES = {
    "load_balancing": lambda p, m: load_balancing_loss(p, 2, m),
    "dense_load_balancing": lambda p, m: load_balancing_loss(p, None, m),
    "within_task": lambda p, m: within_task_balancing_loss(p, torch.arange(p.shape[1]) % 2, None, m),
    "importance": importance_loss,
    "divergence": divergence_loss,
    "load": lambda p, m: load_loss(p.log(), 2, 0.5, m),
    "localized": lambda p, m: localized_balancing_loss(p, torch.arange(p.shape[1]) % 3 - 1, m),
    "z": lambda p, m: z_loss(p.log(), m),
    "entropy": entropy_loss,
    "guidance": lambda p, m: task_guidance_loss(p.log(), torch.arange(p.shape[1]) % 3 - 1, m),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_no_loss(name):
    probs = probs_of(2, 8, 4)
    padded = torch.cat([probs, probs_of(2, 3, 4, seed=1)], dim=1)
    mask = torch.tensor([True] * 8 + [False] * 3)
    expected = LOSSES[name](probs, torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(LOSSES[name](padded, mask), expected)
    torch.testing.assert_close(LOSSES[name](probs, None), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_mean_over_sites(name):
    probs = probs_of(3, 8, 4)
    each = [LOSSES[name](probs[i : i + 1], None) for i in range(3)]
    torch.testing.assert_close(LOSSES[name](probs, None), torch.stack(each).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_mask_gives_zero_and_no_nan(name):
    probs = probs_of(1, 4, 3).requires_grad_()
    loss = LOSSES[name](probs, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert probs.grad.isfinite().all()


def test_within_task_balancing_sees_a_collapse_that_the_global_form_does_not():
    probs = torch.eye(2).repeat_interleave(4, 0)[None]  # each task has its own expert
    tasks = torch.tensor([0] * 4 + [1] * 4)
    assert load_balancing_loss(probs).item() == 1
    assert within_task_balancing_loss(probs, tasks).item() == 2


def test_within_task_balancing_weights_tasks_by_their_tokens():
    probs, tasks = probs_of(2, 10, 3), torch.tensor([0] * 7 + [-1] * 3)
    parts = [load_balancing_loss(probs[:, :7]), load_balancing_loss(probs[:, 7:])]
    expected = 0.7 * parts[0] + 0.3 * parts[1]
    torch.testing.assert_close(within_task_balancing_loss(probs, tasks), expected)


def test_entropy_is_that_of_the_distribution_in_nats():
    uniform = torch.full((1, 3, 4), 0.25)
    torch.testing.assert_close(entropy_loss(uniform), torch.tensor(math.log(4)))
    certain = torch.eye(4)[None].requires_grad_()
    assert entropy_loss(certain).item() == 0


def test_z_loss_is_the_squared_logsumexp():
    logits = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    expected = (torch.tensor([1.0, 2.0]).exp().sum().log() ** 2 + math.log(2) ** 2) / 2
    torch.testing.assert_close(z_loss(logits), expected)


def test_guidance_is_the_cross_entropy_over_samples_of_known_experts():
    logits = torch.randn(1, 4, 3)
    ids = torch.tensor([2, -1, 0, -1])
    expected = torch.nn.functional.cross_entropy(logits[0, [0, 2]], ids[[0, 2]])
    torch.testing.assert_close(task_guidance_loss(logits, ids), expected)


def test_guidance_without_known_experts_is_zero_and_stays_in_the_graph():
    logits = torch.randn(1, 4, 3, requires_grad=True)
    loss = task_guidance_loss(logits, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def test_importance_and_load_equal_loops_over_tokens_and_experts():
    logits, spread = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(3)), 0.4
    totals, loads = [0.0] * 4, [0.0] * 4
    for row in logits[0].double().tolist():
        shares = [math.exp(v) / sum(map(math.exp, row)) for v in row]
        for expert, value in enumerate(row):
            others = sorted(row[:expert] + row[expert + 1 :], reverse=True)
            totals[expert] += shares[expert]
            loads[expert] += 0.5 * (1 + math.erf((value - others[1]) / spread / math.sqrt(2)))  # of the best 2
    assert importance_loss(logits.softmax(-1)).item() == pytest.approx(variation(totals), abs=1e-6)
    assert load_loss(logits, 2, spread).item() == pytest.approx(variation(loads), abs=1e-6)
    one = torch.zeros(1, 5, 4)
    one[..., 1] = 1
    assert importance_loss(one).item() == 3 and load_loss(logits, 4, spread).item() == 0


def test_localized_balancing_is_zero_where_a_groups_own_expert_has_as_much_more_as_it_may():
    more, less = 1 + LOCALITY, 1 - LOCALITY
    shares = torch.tensor([[more, less, less], [less, more, less], [less, less, more]])
    probs, ids = shares.repeat_interleave(2, 0)[None], torch.tensor([0, 0, 1, 1, 2, 2])
    assert localized_balancing_loss(probs, ids).item() == pytest.approx(0, abs=1e-10)
    assert localized_balancing_loss(torch.ones_like(probs), ids).item() > 1e-3
    probs = probs_of(1, 7, 3)
    ids = torch.tensor([0, 0, 2, -1, 2, 2, -1])
    values = []
    for group in (0, 2, -1):
        rows = [p for p, own in zip(probs[0].double().tolist(), ids.tolist(), strict=True) if own == group]
        for expert in range(3):
            factor = 1.0 if group < 0 else less if expert == group else more
            values.append(factor * sum(row[expert] for row in rows) / len(rows))
    assert localized_balancing_loss(probs, ids).item() == pytest.approx(variation(values), abs=1e-6)


def test_divergence_is_zero_for_sure_and_even_decisions_and_equals_the_formula_by_hand():
    assert divergence_loss(torch.eye(4)[None]).item() == 0
    torch.testing.assert_close(divergence_loss(torch.full((1, 3, 4), 0.25)), torch.tensor(0.98 - 0.5 - 0.98 + 1.0))
    probs = torch.tensor([[[0.7, 0.3], [0.9, 0.1]], [[0.6, 0.4], [0.2, 0.8]]])

    def entropy(p: float) -> float:
        return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))

    first = 0.48 - entropy(0.8) + (entropy(0.7) + 0.5) / 2
    second = (
        0.48 - 0.98 * (entropy(0.4) > 0.98) - entropy(0.4) * (entropy(0.4) <= 0.98) + (entropy(0.6) + entropy(0.2)) / 2
    )
    torch.testing.assert_close(divergence_loss(probs), torch.tensor((first + second) / 2))
