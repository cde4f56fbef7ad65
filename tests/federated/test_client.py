"""What a client trains and counts: by roles, factors and ranks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from data.config import SourceConfig
from moa.federated.assignment import assign, concerns, ranks_above
from moa.federated.client import client_mixture, drift_of, gate_mass, only_free, proximal, without
from moa.federated.partition import Client, Row, Tag
from moa.federated.pieces import Names, Role, pieces_of
from tests.test_model import batch_of, make_model

A, B = "experts.vqa.q.lora_A.weight", "experts.vqa.q.lora_B.weight"
SHAPES = {A: (4, 7), B: (5, 4), "router.head.3.weight": (2, 6)}
NAMES = Names(choices=("vqa", "ocr"), evidence=("image", "ocr"))
EXPERTS = Role(name="vqa", match=["experts:vqa"], clients="owners", elsewhere="frozen")
ROUTER = Role(name="router", match=["router:rest"])


def client(*experts: str | None, ocr: bool = False) -> Client:
    has = frozenset({"image", *(["ocr"] if ocr else [])})
    tags = [Tag(source="s", index=i, image=str(i), task="t", expert=e, modalities=has) for i, e in enumerate(experts)]
    return Client(name="client-0", train=tuple(Row(tag=tag) for tag in tags))


def assigned(who: Client, *roles: Role, **more):
    roles = roles or (EXPERTS, ROUTER)
    pieces = pieces_of(SHAPES, roles, NAMES)
    return assign(who, roles, pieces, SHAPES, routed={"vqa", "ocr"}, **more)


def test_an_owner_trains_and_sends_its_expert_and_another_client_keeps_it_frozen():
    owner, other = assigned(client("vqa")), assigned(client("ocr"))
    assert [role.name for role in owner.sends] == ["vqa", "router"] and owner.free[A].all()
    assert [role.name for role in other.sends] == ["router"]
    assert not other.free[A].any() and not other.free[B].any() and other.free["router.head.3.weight"].all()


@pytest.mark.parametrize(("how", "round_", "moves"), [("freeze_a", 2, B), ("alternate", 1, B), ("alternate", 2, A)])
def test_the_factor_that_rests_is_neither_trained_nor_sent(how, round_, moves):
    roles = [Role(name=f, match=[f"experts:*.{f}"]) for f in "AB"] + [ROUTER]
    found = assigned(client("vqa"), *roles, factors=how, round_=round_)
    assert [role.name for role in found.sends] == [moves[-8], "router"]
    assert [key for key in (A, B) if found.free[key].any()] == [moves]


def test_a_client_of_a_lower_rank_trains_its_ranks_and_sends_no_role_of_those_above():
    roles = [Role(name=f"from {s}", match=[f"experts:*.ranks={s}:{s + 2}"]) for s in (0, 2)] + [ROUTER]
    found = assigned(client("vqa"), *roles, rank=2)
    assert [role.name for role in found.sends] == ["from 0", "router"]
    assert found.free[A][:2].all() and not found.free[A][2:].any()
    assert found.free[B][:, :2].all() and not found.free[B][:, 2:].any()
    assert [piece.name for piece in ranks_above(SHAPES, 2)] == [f"{A}[2:4]", f"{B}[:,2:4]"]


def test_a_rank_inside_the_ranks_of_a_role_is_refused():
    roles = [Role(name=f"from {s}", match=[f"experts:*.ranks={s}:{s + 2}"]) for s in (0, 2)] + [ROUTER]
    with pytest.raises(ValueError, match="client-0 rank 3 is inside the ranks 2:4 of the role from 2"):
        assigned(client("vqa"), *roles, rank=3)
    assert assigned(client("vqa"), rank=3).sends  # of whole factors, with zeros (HetLoRA)


def test_a_role_that_is_kept_is_trained_and_never_sent():
    found = assigned(client("ocr"), Role(name="own", match=["rest"], keep=True))
    assert not found.sends and [role.name for role in found.keeps] == ["own"] and found.free[A].all()


def test_an_expert_that_a_client_lacks_is_neither_trained_nor_sent_and_gets_no_gate():
    absent = Role(name="vqa", match=["experts:vqa"], clients="owners", elsewhere="absent")
    for found in (assigned(client("ocr"), absent, ROUTER), assigned(client("ocr"), lacks=["vqa"])):
        assert found.absent == {"vqa"} and not found.free[A].any() and [r.name for r in found.sends] == ["router"]
    assert not assigned(client("vqa"), absent, ROUTER).absent
    model = make_model()
    batch = batch_of(model)
    with without(model, {"vqa"}):
        gates = model.compute_gates(batch).gates
        one_hot = model.compute_gates(batch, override=torch.eye(3)[[0, 1, 2, 1]]).gates
    assert torch.equal(gates[..., 0], torch.zeros(4, 1)) and torch.allclose(gates.sum(-1), torch.ones(4, 1))
    assert one_hot[0, 0, 0] == 0 and one_hot[1, 0, 1] == 1
    assert (model.compute_gates(batch).gates[..., 0] > 0).all()


@pytest.mark.parametrize(
    ("experts", "roles", "lacks", "message"),
    [
        (("ocr",), (Role(name="all", match=["rest"]),), ["vqa"], "sends the role all, and lacks an expert of it"),
        (("ocr",), (EXPERTS, ROUTER), ["vqa", "ocr"], "has samples of the expert ocr, and lacks it"),
        ((None,), (Role(name="own", match=["rest"], keep=True),), ["vqa", "ocr"], "has no routed expert"),
    ],
)
def test_a_client_that_lacks_too_much_is_named(experts, roles, lacks, message):
    with pytest.raises(ValueError, match=message):
        assigned(client(*experts), *roles, lacks=lacks)


@pytest.mark.parametrize(
    ("match", "expert", "evidence", "counts"),
    [
        ("experts:vqa", "vqa", (), True), ("experts:vqa.A", "vqa", (), True), ("experts:vqa", "ocr", (), False),
        ("experts:vqa", None, (), True), ("experts:shared", "ocr", (), True), ("experts:*", "ocr", (), True),
        ("router:row=vqa", "ocr", (), False), ("router:evidence=ocr", "vqa", ("ocr",), True),
        ("router:evidence=ocr", "vqa", (), False), ("router:missing=ocr", "vqa", ("image",), True),
        ("router:rest", "ocr", (), True), ("projector", "ocr", (), True),
    ],
)  # fmt: skip
def test_the_samples_of_a_role(match, expert, evidence, counts):
    assert concerns(Role(name="r", match=[match]), expert, evidence, {"vqa", "ocr"}) == counts


def test_gate_mass_is_that_of_the_experts_that_a_role_names():
    metrics = {"gates/vqa/vqa": 0.75, "gates/vqa/ocr": 0.25, "gates/caption/vqa": 0.1}
    assert gate_mass(EXPERTS, "vqa", metrics) == 0.75
    assert gate_mass(Role(name="row", match=["router:row=ocr"]), "vqa", metrics) == 0.25
    assert gate_mass(ROUTER, "vqa", metrics) == 1.0


def test_what_is_not_free_gets_no_gradient():
    parameter, free = nn.Parameter(torch.ones(3)), {"p": torch.tensor([True, False, True])}
    with only_free({"p": parameter}, free):
        (2 * parameter).sum().backward()
    assert torch.equal(parameter.grad, torch.tensor([2.0, 0.0, 2.0]))
    parameter.grad = None
    (2 * parameter).sum().backward()
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))


def test_the_proximal_term_is_half_the_squared_distance():
    now = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    then = [torch.tensor([0.0, 4.0]), torch.tensor([3.0])]
    assert proximal(now, then) == 2.5


def test_each_step_is_corrected_by_the_variates_and_the_clients_becomes_the_mean_of_its_own_steps():
    who = assigned(client("vqa"), replace(EXPERTS, clients="all", server="scaffold"), ROUTER, factors="freeze_a")
    start = {key: torch.randn(shape) for key, shape in SHAPES.items()}
    c, own = torch.randn(5, 4), torch.randn(5, 4)
    received = start | {f"c of {B}": c, f"c_k of {B}": own, f"c of {A}": torch.ones(4, 7)}
    pieces = pieces_of(SHAPES, (EXPERTS, ROUTER), NAMES)
    drift, now = drift_of(received, who, pieces, start), {key: tensor.clone() for key, tensor in start.items()}
    steps, rates = torch.randn(2, 5, 4), (0.1, 0.3)
    for step, rate in zip(steps, rates, strict=True):
        now[B] -= rate * step  # of the optimiser
        drift.step(now, {"lr/experts": rate})
    torch.testing.assert_close(now[B], start[B] - 0.1 * steps[0] - 0.3 * steps[1] - 0.4 * (c - own))
    assert torch.equal(now[A], start[A]) and torch.equal(now["router.head.3.weight"], start["router.head.3.weight"])
    assert drift.rates["rates of experts"] == pytest.approx(0.4)
    torch.testing.assert_close(
        drift.next(start, now)[f"c_k of {B}"], (0.1 * steps[0] + 0.3 * steps[1]) / 0.4, atol=1e-5, rtol=1e-5
    )


class Numbers:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        raise NotImplementedError


def test_a_client_draws_by_what_it_has_of_each_source_and_goes_on_in_the_next_round():
    rows = [Row(tag=Tag(source=s, index=i, image="", task=s)) for s, n in (("a", 8), ("b", 2)) for i in range(n)]
    sources = {"a": Numbers(8), "b": Numbers(8)}
    configs = {name: SourceConfig(name=name, num_samples=8) for name in sources}
    mixture = client_mixture(Client(name="c", train=tuple(rows)), sources, configs, seed=0)
    drawn = [mixture.locate(position)[0] for position in range(1000)]
    assert drawn.count("a") == 800
    mixture.start = 600
    assert [mixture.locate(position)[0] for position in range(400)] == drawn[600:]
