import pytest
import torch

from moa.routing.gating import (
    anchor_similarity,
    anchor_sums,
    apply_availability,
    likeness_gates,
    one_hot_gates,
    sigmoid_gates,
    softmax_gates,
    top_k_gates,
)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_softmax_gates_are_shares_that_sum_to_one():
    x = logits(5, 1, 4)
    gates = softmax_gates(x)
    torch.testing.assert_close(gates, x.exp() / x.exp().sum(-1, keepdim=True))


def test_gates_are_float32_whatever_the_logits_are():
    x = logits(3, 4).bfloat16()
    for gates in (softmax_gates(x), sigmoid_gates(x), top_k_gates(x, 2)):
        assert gates.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_gates_are_sparse_and_equal_the_renormalised_probabilities(k):
    x = logits(6, 2, 4)
    gates, probs = top_k_gates(x, k), softmax_gates(x)
    assert ((gates > 0).sum(-1) == k).all()
    kept = probs * (gates > 0)
    torch.testing.assert_close(gates, kept / kept.sum(-1, keepdim=True))
    assert (kept.sum(-1) >= probs.topk(k, -1).values.sum(-1) - 1e-6).all()


def test_top_k_gates_never_give_a_masked_expert_a_place():
    x = torch.tensor([[5.0, 4.0, 1.0, 0.0]])
    mask = torch.tensor([[False, True, True, False]])
    gates = top_k_gates(x, 2, mask)
    torch.testing.assert_close(gates[0, 1:3], torch.tensor([4.0, 1.0]).softmax(-1))
    assert gates[0, 0] == gates[0, 3] == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_gates_use_fewer_experts_where_fewer_are_left_and_none_where_none_is(k):
    x = logits(2, 3).requires_grad_()
    gates = top_k_gates(x, k, torch.tensor([[False, True, False], [False, False, False]]))
    assert gates.tolist() == [[0, 1, 0], [0, 0, 0]]
    gates.square().sum().backward()
    assert x.grad.isfinite().all()


def test_top_k_gates_survive_logits_of_any_size():
    gates = top_k_gates(torch.tensor([[-4000.0, -4001.0, 3e4], [3e4, -3e4, 0.0]]), 2)
    assert gates.isfinite().all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2))


@pytest.mark.parametrize("k", [0, 5])
def test_a_top_k_beyond_the_experts_is_refused_with_the_choices(k):
    with pytest.raises(ValueError, match=rf"1\.\.4.*got {k}"):
        top_k_gates(logits(2, 4), k)


def test_sigmoid_gates_leave_each_expert_to_itself():
    x = logits(3, 4)
    changed = x.clone()
    changed[:, 0] += 3
    torch.testing.assert_close(sigmoid_gates(x)[:, 1:], sigmoid_gates(changed)[:, 1:])


def test_one_hot_gates_are_uniform_where_the_expert_is_unknown():
    gates = one_hot_gates(torch.tensor([2, -1, 0]), 4)
    assert gates.tolist() == [[0, 0, 1, 0], [0.25] * 4, [1, 0, 0, 0]]


def test_unavailable_experts_get_exact_zeros_and_the_rest_keeps_the_sum():
    gates = torch.tensor([[0.5, 0.3, 0.2], [2.0, 0.0, 0.0], [0.5, 1.5, 0.0], [0.0, 0.0, 0.0]])
    masked = apply_availability(gates, torch.tensor([[False, True, True]]))
    expected = [[0.0, 0.6, 0.4], [0.0, 1.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(masked, torch.tensor(expected))
    sites = apply_availability(gates.view(2, 2, 3), torch.tensor([[[False, True, True]]]))
    torch.testing.assert_close(sites, torch.tensor(expected).view(2, 2, 3))
    assert apply_availability(gates, torch.tensor([True, True, True])).equal(gates)


def test_no_expert_available_gives_zeros_and_no_nan():
    gates = apply_availability(torch.tensor([[0.5, 0.5]]), torch.tensor([[False, False]]))
    assert gates.tolist() == [[0, 0]]


def test_anchors_are_the_same_in_one_batch_or_in_many_and_skip_missing_evidence():
    features, ids = logits(8, 5), torch.tensor([0, 1, 0, -1, 1, 0, 1, 0])
    present = torch.tensor([True] * 7 + [False])
    zeros = torch.zeros(2, 5), torch.zeros(2)
    whole = anchor_sums(*zeros, features, present, ids)
    parts = zeros
    for i in range(8):
        parts = anchor_sums(*parts, features[i : i + 1], present[i : i + 1], ids[i : i + 1])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    assert whole[1].tolist() == [3, 3]
    torch.testing.assert_close(whole[0][0], features[[0, 2, 5]].sum(0))


def test_anchors_recognise_the_expert_whose_mean_evidence_is_near():
    means = 3 + logits(3, 16)  # a common offset, as raw encoder features have
    ids = torch.arange(3).repeat(10)
    features = means[ids] + 0.1 * logits(30, 16)
    present = torch.ones(30, dtype=torch.bool)
    sums, counts = anchor_sums(torch.zeros(3, 16), torch.zeros(3), features, present, ids)
    similarity = anchor_similarity(sums, counts, features, present)
    assert similarity.argmax(-1).equal(ids)
    alone = anchor_similarity(sums, counts, features[4:5], present[4:5])
    torch.testing.assert_close(alone, similarity[4:5])


def test_anchors_are_compared_around_the_mean_of_all_samples():
    """Nine samples of expert 0 at (0, 2), one of expert 1 at (10, 2): the mean is (1, 2), whatever the experts' own."""
    sums, counts = torch.tensor([[0.0, 18.0], [10.0, 2.0]]), torch.tensor([9.0, 1.0])
    features = torch.tensor([[1.0, 3.0], [2.0, 2.0], [4.0, 6.0]])
    similarity = anchor_similarity(sums, counts, features, torch.tensor([True] * 3))
    expected = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [-0.6, 0.6]])
    torch.testing.assert_close(similarity, expected)


def test_likeness_is_each_cosine_by_itself_and_leaves_the_rest():
    sums, counts = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([3.0, 1.0])
    features = torch.tensor([[2.0, 0.0], [0.0, -1.0], [1.0, 1.0]])
    similarity = anchor_similarity(sums, counts, features, torch.tensor([True] * 3), centred=False)
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 0.5**0.5], [0.0, -(0.5**0.5)], [0.5**0.5, 1.0]]))
    torch.testing.assert_close(likeness_gates(similarity[:, :1] / 2), torch.tensor([[0.5], [0.0], [0.5**1.5]]))
    torch.testing.assert_close(likeness_gates(similarity).sum(-1), torch.tensor([1.0, 0.0, 1.0]))


def test_anchors_say_nothing_about_missing_evidence_or_unseen_experts():
    sums, counts = torch.zeros(2, 4), torch.tensor([0.0, 0.0])
    sums, counts = anchor_sums(sums, counts, logits(2, 4), torch.tensor([True, True]), torch.tensor([0, 0]))
    similarity = anchor_similarity(sums, counts, logits(2, 4), torch.tensor([True, False]))
    assert similarity[:, 1].tolist() == [0, 0]
    assert similarity[1].tolist() == [0, 0]


def test_one_hot_gates_are_zero_where_no_expert_is_wanted():
    gates = one_hot_gates(torch.tensor([1, 2, -1]), 2)
    assert gates.tolist() == [[0.0, 1.0], [0.0, 0.0], [0.5, 0.5]]
