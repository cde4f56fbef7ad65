"""Shared experts: gates of all experts from those that the router chooses among."""

import pytest
import torch

from data.sample import UNKNOWN_TASK
from moa.routing.losses import load_balancing_loss, task_guidance_loss
from moa.routing.roles import Roles, check_roles
from moa.routing.router import Evidence
from moa.routing.routing import Routing
from moa.routing.schedule import GateDraws, GateSchedule, draw_gates

NOTHING = Evidence()


class Logits(torch.nn.Module):
    """A router that always has these logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits)[:, None])

    def forward(self, evidence, withhold):
        return self.logits


def routing(gates: str, logits, kind="softmax", **settings) -> Routing:
    roles = Roles(tuple("abcde"[: len(gates.split())]), tuple(gates.split()))
    return Routing(Logits(logits), roles=roles, kind=kind, **settings)


def decided(model: Routing, **choice):
    ids = torch.full((model.router.logits.shape[0],), -1)
    return model.decide(NOTHING, ids, **choice)


P, Q = torch.softmax(torch.tensor([1.0, 0.0]), 0).tolist()


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ("routed routed", [P, Q]),
        ("always routed routed", [1, P, Q]),
        ("routed always routed", [P, 1, Q]),
        ("routed routed confidence", [P * P, Q * P, 1 - P]),
        ("routed with:a routed", [P, P, Q]),
        ("routed routed with:d always", [P, Q, 1, 1]),
        ("with:b routed routed", [P, P, Q]),
    ],
)
def test_gates_of_shared_experts_follow_from_the_routers_choice(gates, expected):
    found = decided(routing(gates, [[1.0, 0.0]])).gates
    torch.testing.assert_close(found, torch.tensor([[expected]]))


def test_the_rest_is_what_a_choice_that_is_not_renormalised_leaves():
    """MoCLE, 2312.12379: y = w y_e + (1 - w) y_universal, with w the largest share."""
    model = routing("routed routed rest", [[1.0, 0.0], [0.0, 3.0]], kind="top_k", top_k=1, renormalize=False)
    w = torch.softmax(torch.tensor([3.0, 0.0]), 0)[0].item()
    torch.testing.assert_close(decided(model).gates[:, 0], torch.tensor([[P, 0, 1 - P], [0, w, 1 - w]]))
    assert model.oracle(torch.tensor([1, 2])).tolist() == [[[0, 1, 0]], [[0, 0, 1]]]


def test_where_experts_are_added_up_each_has_the_gate_one_and_elsewhere_the_routers():
    """HiDe-LLaVA: all experts below, the router in the last layer; shared ones keep their gate."""
    model = routing("routed routed always", [[1.0, 0.0]], added_up=[True, False])
    gates = decided(model).gates
    torch.testing.assert_close(gates[0], torch.tensor([[1.0, 1.0, 1.0], [P, Q, 1.0]]))
    assert model.oracle(torch.tensor([1])).tolist() == [[[0, 1, 1]]]  # what trains experts apart is as it was
    few = decided(model, available=torch.tensor([True, False, True])).gates
    assert few[0].tolist() == [[1, 0, 1], [1, 0, 1]]


def test_a_task_that_is_none_of_the_runs_gets_all_experts_alike_or_none_of_them():
    logits = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    told = Evidence(task_ids=torch.tensor([0, -1, UNKNOWN_TASK]))  # a task of the run, none or withheld, another
    ids = torch.full((3,), -1)
    routed, shared = [P, Q, 1], {"mean": [0.5, 0.5, 1], "none": [0, 0, 0], "route": [P, Q, 1]}
    for rule, expected in shared.items():
        model = routing("routed routed always", logits, unknown_task=rule)
        torch.testing.assert_close(model.decide(told, ids).gates[:, 0], torch.tensor([routed, routed, expected]))
        hidden = model.decide(told, ids, withhold=["task"]).gates[:, 0]
        torch.testing.assert_close(hidden, torch.tensor([routed] * 3))
    model = routing("routed routed always", logits, unknown_task="mean")
    few = model.decide(told, ids, available=torch.tensor([True, False, True])).gates[:, 0]
    assert few.tolist() == [[1, 0, 1]] * 3


@pytest.mark.parametrize(
    ("gates", "rule", "expected"),
    [
        ("routed routed confidence", "none", [0, 0, 0]),
        ("joint routed rest", "none", [0, 0, 0]),
        ("routed routed with:a", "none", [0, 0, 0]),
        ("routed routed always", "none", [0, 0, 0]),
        ("routed routed rest", "mean", [0.5, 0.5, 0]),
        ("joint routed with:a", "mean", [0.5, 0.5, 0.5]),
    ],
)
def test_at_an_unknown_task_none_is_the_base_and_mean_the_merged_adapter_where_experts_are_added_up_too(
    gates, rule, expected
):
    model = routing(gates, [[1.0, 0.0]] * 2, unknown_task=rule, added_up=[True, False])
    found = model.decide(Evidence(task_ids=torch.tensor([-1, UNKNOWN_TASK])), torch.tensor([-1, -1])).gates
    assert found[1].tolist() == [expected] * 2 and found[0, 0, :2].tolist() == [1, 1] != expected


def test_a_joint_expert_shares_the_softmax_takes_no_place_of_top_k_and_is_not_balanced():
    model = routing("joint routed routed routed", [[0.0, 2.0, 1.0, 1.5]], kind="top_k", top_k=1)
    gates = decided(model).gates[0, 0]
    torch.testing.assert_close(gates[[0, 1]], torch.softmax(torch.tensor([0.0, 2.0]), 0))
    assert gates[2:].tolist() == [0, 0]
    losses = model.losses([decided(model)], torch.tensor([1]), torch.tensor([0]))
    logits = torch.tensor([[[2.0, 1.0, 1.5]]])  # those of the routed ones
    torch.testing.assert_close(losses["load_balancing"], load_balancing_loss(logits.softmax(-1), 1))
    torch.testing.assert_close(losses["guidance"], task_guidance_loss(logits, torch.tensor([0])))


def test_the_oracle_gives_each_sample_its_own_expert_beside_the_shared_ones():
    model = routing("routed always routed with:a", [[0.0, 0.0]])
    found = model.oracle(torch.tensor([0, 2, 1, 3, -1, 4]))[:, 0]  # 4: no expert at all
    own, other, none = [1, 1, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0]
    assert found.tolist() == [own, other, none, own, [0.5, 1, 0.5, 0.5], none]
    joint = routing("joint routed routed", [[0.0, 0.0, 0.0]])
    assert joint.oracle(torch.tensor([1, 0]))[:, 0].tolist() == [[0.5, 0.5, 0], [1, 0, 0]]
    sure = routing("routed routed confidence", [[0.0, 0.0]])
    assert sure.oracle(torch.tensor([0, 2]))[:, 0].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_sample_of_a_shared_expert_alone_has_no_target_and_of_no_expert_the_null_choice():
    plain, null = (routing("always routed routed", [[0.0, 0.0]], null_expert=n) for n in (False, True))
    ids = torch.tensor([0, 1, 2, -1, 3])
    assert plain.targets(ids).tolist() == [-1, 0, 1, -1, -1]
    assert null.targets(ids).tolist() == [2, 0, 1, -1, 2]
    gates = decided(null).gates[0, 0]
    torch.testing.assert_close(gates, torch.tensor([1, 1 / 3, 1 / 3]))


def test_an_unavailable_expert_has_gate_zero_and_a_shared_one_takes_nothing_of_the_routed_ones():
    model = routing("always routed routed", [[1.0, 0.0]])
    left = torch.tensor([True, False, True])
    assert decided(model, available=left).gates[0, 0].tolist() == [1, 0, 1]
    assert decided(model, available=torch.tensor([False, True, True])).gates[0, 0, 0] == 0
    given = model.override(torch.tensor([[1.0, 0.25, 0.75]]), left).gates
    assert given[0, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"a": "sometimes"}, ("a", "must be one of")),
        ({"a": "with:b"}, ("a", "no such expert 'b'")),
        ({"a": "with:a"}, ("a", "no gate of its own")),
        ({"a": "with:b", "b": "with:c", "c": "routed"}, ("a", "b has the gate with:c itself")),
    ],
)
def test_a_gate_that_means_nothing_is_named(gates, expected):
    name, rule = check_roles(gates)
    assert name == expected[0] and expected[1] in rule


def test_leak_spreads_the_gates_and_blend_and_dropout_act_on_the_samples_that_were_drawn():
    gates = torch.tensor([[[1.0, 0.0]]] * 4)
    keep, share = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.5, 1.0, 0.5])
    found = GateDraws(leak=0.2, keep=keep, share=share, blend_to="mean").apply(gates)
    leaked = torch.tensor([0.9, 0.1])
    rows = [leaked, (leaked + 0.5) / 2, torch.tensor([0.5, 0.5]), torch.zeros(2)]
    torch.testing.assert_close(found[:, 0], torch.stack(rows))
    summed = GateDraws(leak=0.0, keep=keep, share=share, blend_to="sum").apply(gates)
    assert summed[2, 0].tolist() == [1, 1]


def test_experts_that_are_left_out_give_their_gates_to_the_others_of_a_sample():
    gates = torch.tensor([[[0.5, 0.3, 0.2]], [[0.5, 0.3, 0.2]], [[1.0, 0.0, 0.0]]])
    left = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    none, rest = torch.zeros(3), {"leak": 0.0, "blend_to": "mean", "left": left}
    found = GateDraws(keep=torch.ones(3), share=none, **rest).apply(gates)
    torch.testing.assert_close(found[:, 0], torch.tensor([[0.0, 0.6, 0.4], [0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]))
    drawn = draw_gates(GateSchedule(expert_dropout=0.3), 0.5, 5_000, 4)
    assert float((drawn.left == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


def test_a_leak_and_a_blend_leave_samples_of_no_expert_without_a_routed_one():
    model, ones = routing("routed routed always", [[0.0, 0.0]], null_expert=True), torch.ones(4)
    draws = GateDraws(keep=ones, share=torch.tensor([0.0, 1.0, 1.0, 0.0]), leak=0.5, blend_to="sum")
    found = model.oracle(torch.tensor([0, 3, 0, 3]), draws)[:, 0]
    assert found.tolist() == [[0.75, 0.25, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1]]


def test_a_schedule_is_linear_over_its_stage_and_an_empty_one_draws_nothing():
    schedule = GateSchedule(leak=0.4, leak_end=0.0, blend=0.3)
    assert schedule.at(0.25) == {"leak": pytest.approx(0.3), "dropout": 0, "blend": 0.3}
    state = torch.get_rng_state()
    assert draw_gates(GateSchedule(), 0.5, 8) is None
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(0)
    draws = draw_gates(GateSchedule(blend=0.4, dropout=0.25), 0.5, 20_000)
    assert float((draws.share > 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert float((draws.share == 1).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((draws.keep == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
