"""Selections and noise: which gates a decision keeps, against loops, and what holds for every kind."""

import math

import pytest
import torch

from moa.routing.gating import (
    NOISES,
    balanced_bias,
    cut_gates,
    straight_through,
    threshold_gates,
    top_k_gates,
    top_p_gates,
)
from moa.routing.kinds import KINDS
from moa.routing.roles import Roles
from moa.routing.router import Evidence, Router
from moa.routing.routing import Routing

NOTHING = Evidence()
CHOSEN = [
    ("softmax", {}),
    ("top_k", {"top_k": 2}),
    ("top_k", {"top_k": 1, "straight_through": True}),
    ("top_p", {}),
    ("top_p", {"top_p": 0.5, "straight_through": True}),
    ("threshold", {}),
    ("threshold", {"threshold": 0.1}),
    ("sigmoid", {}),
    ("sigmoid", {"threshold": 0.5}),
    ("sigmoid", {"normalize": True}),
]


class Columns(torch.nn.Module):
    """A router that always has these columns: logits, and what else it learns."""

    def __init__(self, columns):
        super().__init__()
        self.columns = torch.nn.Parameter(columns[:, None])

    def forward(self, evidence, withhold):
        return self.columns


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns_for(kind: str, settings: dict, batch: int = 16, experts: int = 5) -> torch.Tensor:
    more = KINDS[kind].learned_threshold and settings.get("threshold") is None
    return random_logits(batch, experts + more) * 2


def routing(kind: str, columns: torch.Tensor, roles: str = "r r r r r", **settings) -> Routing:
    names = {"r": "routed", "j": "joint"}
    gates = tuple(names[letter] for letter in roles.split())
    return Routing(Columns(columns), roles=Roles(tuple("abcdefg"[: len(gates)]), gates), kind=kind, **settings)


def decided(model: Routing, **choice) -> torch.Tensor:
    found = model.decide(NOTHING, torch.full((len(model.router.columns),), -1), **choice).gates
    assert found is not None
    return found[:, 0]


# Against loops ---------------------------------------------------------------------------------------


def softmax_of(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8, 1.0])
def test_top_p_keeps_the_fewest_whose_probabilities_reach_p(p):
    x = random_logits(20, 6) * 2
    for row, gates in zip(x.double().tolist(), top_p_gates(x, p).tolist(), strict=True):
        probs, kept = softmax_of(row), list[int]()
        for expert in sorted(range(6), key=lambda e: -probs[e]):
            if sum(probs[e] for e in kept) < p:
                kept.append(expert)
        total = sum(probs[e] for e in kept)
        assert gates == pytest.approx([probs[e] / total if e in kept else 0.0 for e in range(6)], abs=1e-6)
        assert [gate > 0 for gate in gates] == [e in kept for e in range(6)]


def test_the_threshold_of_adamole_is_learned_up_to_one_in_e():
    columns = random_logits(20, 6) * 2
    found = decided(routing("threshold", columns))
    for row, gates in zip(columns.double().tolist(), found.tolist(), strict=True):
        level = 1 / 5 / (1 + math.exp(-row[5]))
        above = [max(0.0, p - level) for p in softmax_of(row[:5])]
        assert gates == pytest.approx([a / sum(above) for a in above], abs=1e-6)
        assert [gate > 0 for gate in gates] == [a > 0 for a in above]


def test_a_row_below_a_fixed_threshold_is_zeros_without_a_nan_in_its_gradient():
    x = torch.zeros(2, 4)
    x[1, 0] = 3.0
    x.requires_grad_()
    gates = threshold_gates(x, 0.5)
    assert gates.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    gates.square().sum().backward()
    assert x.grad.isfinite().all()


def test_sigmoid_gates_above_a_threshold_stay_as_they_are_and_sum_to_one_where_asked_for():
    gates = torch.tensor([[0.2, 0.5, 0.6, 0.9], [0.1, 0.1, 0.1, 0.1]])
    assert cut_gates(gates, 0.5, False).tolist() == torch.tensor([[0, 0, 0.6, 0.9], [0, 0, 0, 0]]).tolist()
    torch.testing.assert_close(cut_gates(gates, 0.5, True)[0], torch.tensor([0, 0, 0.4, 0.6]))
    torch.testing.assert_close(cut_gates(gates, None, True).sum(-1), torch.ones(2))


@pytest.mark.parametrize(("kind", "settings"), [("top_k", {"top_k": 2}), ("top_p", {"top_p": 0.6})])
def test_without_renormalize_gates_are_shares_among_all_experts_and_the_same_ones_are_kept(kind, settings):
    columns = random_logits(20, 5) * 2
    shares, probs = decided(routing(kind, columns, renormalize=False, **settings)), columns.softmax(-1)
    whole = decided(routing(kind, columns, **settings))
    torch.testing.assert_close(shares, probs * (whole > 0))
    torch.testing.assert_close(shares / shares.sum(-1, keepdim=True), whole)


def test_a_bias_changes_who_is_chosen_and_no_weight():
    x, bias = random_logits(20, 5), random_logits(5, seed=1) / 4
    for row, gates in zip(x.double().tolist(), top_k_gates(x, 2, bias=bias).tolist(), strict=True):
        probs = softmax_of(row)
        kept = sorted(range(5), key=lambda e: probs[e] + bias[e].item())[-2:]
        total = sum(probs[e] for e in kept)
        assert gates == pytest.approx([probs[e] / total if e in kept else 0.0 for e in range(5)], abs=1e-6)
    mask = torch.tensor([True, False, True, True, True])
    assert top_k_gates(x, 2, mask.expand(20, 5), bias=torch.tensor([0, 9.0, 0, 0, 0]))[:, 1].eq(0).all()
    load, joint = torch.tensor([4.0, 1.0, 1.0, 2.0]), torch.tensor([False, False, False, True])
    moved = balanced_bias(torch.zeros(4), load, 0.5, joint)
    assert moved.tolist() == [-0.5, 0.5, 0.5, 0.0]  # the mean of the routed ones is 2
    assert balanced_bias(moved, torch.ones(4), 0.5, None).equal(moved)


# Of every kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "settings"), CHOSEN)
def test_gates_sum_as_promised_and_are_exact_zeros_where_not_chosen(kind, settings):
    model = routing(kind, columns_for(kind, settings), **settings)
    gates = decided(model)
    assert (gates >= 0).all() and gates.dtype == torch.float32
    if kind != "sigmoid" or settings.get("normalize"):
        torch.testing.assert_close(gates.sum(-1), torch.ones(len(gates)))
    few = {"top_k", "top_p", "threshold"}
    assert (gates == 0).any() == (kind in few or "threshold" in settings)


@pytest.mark.parametrize(("kind", "settings"), CHOSEN)
def test_unavailable_experts_have_gate_zero_and_none_available_gives_zeros(kind, settings):
    model = routing(kind, columns_for(kind, settings), **settings)
    mask = torch.tensor([False, True, True, False, True])
    gates = decided(model, available=mask)
    assert gates[:, ~mask].eq(0).all() and gates.isfinite().all()
    if kind != "sigmoid":
        alone = routing(kind, model.router.columns.detach()[:, 0], **settings)
        torch.testing.assert_close(gates.sum(-1), torch.ones(len(gates)))
        assert decided(alone, available=torch.ones(5, dtype=torch.bool)).equal(decided(alone))
    assert decided(model, available=torch.zeros(5, dtype=torch.bool)).eq(0).all()


@pytest.mark.parametrize(("kind", "settings"), CHOSEN)
def test_the_order_of_the_experts_does_not_matter(kind, settings):
    columns, order = columns_for(kind, settings), [3, 0, 4, 1, 2]
    mixed = torch.cat([columns[:, order], columns[:, 5:]], dim=-1)
    one, other = decided(routing(kind, columns, **settings)), decided(routing(kind, mixed, **settings))
    torch.testing.assert_close(other, one[:, order])


@pytest.mark.parametrize(("kind", "settings"), CHOSEN)
@pytest.mark.parametrize("noise", [None, "learned"])
def test_everything_that_is_learned_has_a_gradient_from_the_gates(kind, settings, noise):
    torch.manual_seed(0)
    learned = {
        "learned_threshold": KINDS[kind].learned_threshold and not settings.get("threshold"),
        "learned_noise": noise == "learned",
    }
    router = Router(experts=5, sites=1, evidence=("task",), dims={}, num_tasks=4, hidden=8, **learned)
    torch.nn.init.normal_(router.head[-1].weight)
    roles = Roles(tuple("abcde"), ("routed",) * 5)
    model = Routing(router, roles=roles, kind=kind, noise=noise, **settings).train()
    ids = torch.arange(64) % 5 - 1
    gates = model.decide(Evidence(task_ids=ids), ids).gates
    (gates * random_logits(64, 1, 5, seed=3)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["top_p", "threshold"])
def test_a_joint_expert_is_kept_beside_those_that_are_chosen(kind):
    columns = torch.tensor([[-1.0, 4.0, 0.0, 1.0]])
    settings = {"top_p": 0.9} if kind == "top_p" else {"threshold": 0.3}
    gates = decided(routing(kind, columns, "j r r r", **settings))[0]
    assert gates[2:].tolist() == [0, 0] and gates[0] > 0
    probs = columns[0].softmax(-1)
    expected = columns[0, :2].softmax(-1) if kind == "top_p" else (probs - torch.tensor([0, 0.3, 0, 0]))[:2]
    torch.testing.assert_close(gates[:2], expected / expected.sum())


def test_no_expert_may_be_what_is_chosen():
    for kind, settings in (("top_p", {"top_p": 0.5}), ("threshold", {"threshold": 0.2})):
        model = routing(kind, torch.tensor([[-4.0, -5.0, -6.0]]), "r r r", null_expert=True, **settings)
        assert decided(model).tolist() == [[0, 0, 0]]


# Straight through ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_straight_through_has_the_values_of_the_gates_and_the_gradient_of_the_softmax(k):
    x, weight = random_logits(8, 5).requires_grad_(), random_logits(8, 5, seed=1)
    soft = x.softmax(-1)
    found = straight_through(top_k_gates(x, k), soft)
    assert found.equal(top_k_gates(x, k))
    (given,) = torch.autograd.grad((found * weight).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((soft * weight).sum(), x)
    torch.testing.assert_close(given, expected)


# Noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_drawn_in_training_alone_from_the_one_stream_and_no_loss_sees_it(noise):
    more = random_logits(16, 5, seed=2) if noise == "learned" else torch.empty(16, 0)
    kind = "sigmoid" if noise == "logistic" else "softmax"
    model = routing(kind, torch.cat([columns_for(kind, {}), more], -1), noise=noise).eval()
    before = torch.get_rng_state()
    quiet = decided(model)
    assert before.equal(torch.get_rng_state())
    model.train()
    torch.manual_seed(0)
    one, other = decided(model), decided(model)
    torch.manual_seed(0)
    assert decided(model).equal(one) and not one.equal(other) and not one.equal(quiet)
    ids = torch.full((16,), -1)
    probs = [model.train(training).decide(NOTHING, ids).probs for training in (True, False)]
    assert probs[0].equal(probs[1])


def test_gumbel_noise_chooses_by_the_probabilities_and_logistic_noise_by_the_sigmoid():
    torch.manual_seed(0)
    row, many = torch.tensor([1.0, 0.0, -1.0]), 40_000
    model = routing("softmax", row.expand(many, 3), "r r r", noise="gumbel").train()
    share = torch.bincount(decided(model).argmax(-1), minlength=3) / many
    torch.testing.assert_close(share, row.softmax(-1), atol=0.01, rtol=0)
    model = routing("sigmoid", row.expand(many, 3), "r r r", noise="logistic").train()
    torch.testing.assert_close((decided(model) > 0.5).float().mean(0), row.sigmoid(), atol=0.01, rtol=0)


@pytest.mark.parametrize(("noise", "scale"), [("gaussian", 0.5), ("learned", None)])
def test_noise_has_its_scale_before_the_temperature(noise, scale):
    torch.manual_seed(0)
    spread = torch.tensor([-1.0, 0.0, 2.0])
    columns = torch.cat([torch.zeros(3), spread] if noise == "learned" else [torch.zeros(3)]).expand(20_000, -1)
    model = routing("sigmoid", columns, "r r r", noise=noise, noise_scale=scale, temperature=2.0).train()
    found = decided(model).logit().std(0)
    expected = torch.nn.functional.softplus(spread) if noise == "learned" else torch.full((3,), 0.5)
    torch.testing.assert_close(found, expected / 2, atol=0, rtol=0.03)


def test_tokens_draw_noise_where_the_layer_decides_and_not_where_gates_are_read():
    roles = Roles(tuple("abc"), ("routed",) * 3)
    model = Routing(roles=roles, kind="threshold", granularity="token", noise="gaussian", temperature=0.5).train()
    columns = random_logits(2, 7, 4)
    read = model.token_gates(columns)
    assert read.equal(model.token_gates(columns)) and not read.equal(model.token_gates(columns, draw=True))
    level = (columns[..., 3:] * 0.5).sigmoid() / 3
    torch.testing.assert_close(read, threshold_gates(columns[..., :3], level))
    assert model.eval().token_gates(columns, draw=True).equal(read)
