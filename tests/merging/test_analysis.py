import math

import pytest
import torch

from moa.analysis.routing import (
    dead_experts,
    delta_cosines,
    duplicates,
    entropy,
    gates_per_task,
    mutual_information,
    routing_accuracy,
    summary,
)

TASKS = ["vqa", "vqa", "caption", "caption"]
SORTED = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
BLIND = torch.full((4, 2), 0.5)


def test_mutual_information_is_one_bit_for_two_sorted_tasks_and_zero_for_a_blind_router():
    assert mutual_information(SORTED, TASKS) == pytest.approx(1.0)
    assert mutual_information(BLIND, TASKS) == pytest.approx(0.0)


def test_mutual_information_equals_the_sum_over_the_joint_table():
    gates = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    tasks = ["a", "a", "b"]
    joint = torch.stack([gates[:2].sum(0), gates[2:].sum(0)]) / 3
    expected = (joint * torch.log2(joint / joint.sum(1, True) / joint.sum(0))).sum()
    assert mutual_information(gates, tasks) == pytest.approx(float(expected), abs=1e-6)


def test_mutual_information_of_sigmoid_gates_is_that_of_their_shares():
    assert mutual_information(3 * SORTED, TASKS) == pytest.approx(1.0)


def test_entropy_is_zero_for_one_expert_and_the_log_for_all_alike():
    assert entropy(torch.tensor([1.0, 0.0])) == 0.0
    assert float(entropy(torch.full((8,), 1 / 8))) == pytest.approx(3.0)


def test_gates_are_averaged_per_task_with_and_without_sites():
    assert gates_per_task(SORTED, TASKS)["caption"].tolist() == [0.0, 1.0]
    sites = torch.stack([SORTED, BLIND], dim=1)
    assert gates_per_task(sites, TASKS)["vqa"].tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_routing_accuracy_counts_only_samples_whose_expert_is_known():
    wanted = ["vqa", "caption", "caption", None]
    assert routing_accuracy(SORTED, wanted, ["vqa", "caption"]) == pytest.approx(2 / 3)
    assert routing_accuracy(SORTED, [None] * 4, ["vqa", "caption"]) is None


def test_an_expert_is_dead_only_if_no_task_uses_it():
    per_task = {"a": torch.tensor([0.5, 0.5, 0.0]), "b": torch.tensor([1.0, 0.0, 0.01])}
    assert dead_experts(per_task, ["x", "y", "z"]) == ["z"]


def test_cosines_of_updates_equal_the_dense_computation():
    torch.manual_seed(0)
    factors = {name: {s: (torch.randn(2, 5), torch.randn(4, 2)) for s in ("one", "two")} for name in "abc"}
    dense = [torch.cat([(b @ a).flatten() for a, b in factors[n].values()]) for n in "abc"]
    expected = torch.cosine_similarity(torch.stack(dense)[:, None], torch.stack(dense)[None], dim=-1)
    assert torch.allclose(delta_cosines(factors).float(), expected, atol=1e-5)


def test_a_rewritten_and_scaled_expert_is_found_as_a_duplicate():
    torch.manual_seed(0)
    a, b, r = torch.randn(3, 6), torch.randn(5, 3), torch.randn(3, 3)
    factors = {
        "old": {"site": (a, b)},
        "copy": {"site": (torch.linalg.inv(r) @ a, 2 * b @ r)},
        "other": {"site": (torch.randn(3, 6), torch.randn(5, 3))},
        "fresh": {"site": (torch.randn(3, 6), torch.zeros(5, 3))},
    }
    cosines = delta_cosines(factors)
    assert duplicates(cosines, list(factors)) == [("old", "copy", 1.0)]
    assert cosines[3].tolist() == [0.0] * 4


def test_the_summary_weighs_tasks_alike_and_names_the_sites_if_they_differ():
    gates, tasks, experts = (torch.cat([SORTED, SORTED[:1]])[:, None], [*TASKS, "vqa"], ["vqa", "line"])
    record = summary(gates, tasks, ["vqa"] * 5, experts)
    assert record["mean_gates"] == pytest.approx([0.5, 0.5])
    assert record["routing_accuracy"] == pytest.approx(3 / 5)
    assert math.isclose(record["entropy"], 0.0) and "per_site" not in record
    held_out = summary(gates, tasks, ["vqa"] * 5, experts, trained_tasks=["vqa"])
    assert held_out["mean_gates"] == [1.0, 0.0] and held_out["mean_over"] == ["vqa"]
    sites = summary(gates.expand(-1, 3, -1), tasks, ["vqa"] * 5, experts)
    assert len(sites["per_site"]["vqa"]) == 3


def test_a_task_with_two_experts_has_a_row_for_each():
    gates = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.5, 0.5]])[:, None]
    wanted = ["vqa", "vqa", "line", None]
    record = summary(gates, ["vqa", "vqa", "vqa", "count"], wanted, ["vqa", "line"],
                     trained_tasks=["vqa"])  # fmt: skip
    assert list(record["per_kind"]) == ["vqa · vqa", "vqa · line", "count"]
    assert record["per_kind"]["vqa · vqa"] == pytest.approx([0.85, 0.15])
    assert record["per_task"]["vqa"] == pytest.approx([1.9 / 3, 1.1 / 3])
    assert record["mean_gates"] == record["per_task"]["vqa"] and record["held_out"] == ["count"]


def test_an_always_on_expert_neither_is_dead_nor_makes_others_so():
    gates = torch.tensor([[0.03, 0.96, 0.01, 1.0], [0.0, 1.0, 0.0, 1.0]])[:, None]
    record = summary(gates, ["a", "b"], [None] * 2, ["x", "y", "z", "shared"], chosen_among=["x", "y", "z"])
    assert record["dead"] == ["z"]  # x has 3 %, and 1.5 % of a sum with the shared one


def test_samples_that_no_expert_should_touch_count_where_the_rest_of_their_weight_is_largest():
    gates = torch.tensor([[0.9, 0.0], [0.1, 0.2], [0.5, 0.4]])[:, None]
    record = summary(gates, ["a", "b", "b"], ["vqa", "none", "none"], ["vqa", "ocr"])
    assert record["routing_accuracy"] == pytest.approx(2 / 3)  # the rest: 0.1, 0.7, 0.1
    assert record["mean_gates"] == pytest.approx([0.6, 0.15])
