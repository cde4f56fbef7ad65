"""What a federation cannot do is named before it begins."""

from types import SimpleNamespace

import pytest
import torch

from moa.federated import matrix
from moa.federated.assignment import Assignment
from moa.federated.config import ClientConfig
from moa.federated.partition import Client, Row, Tag
from moa.federated.pieces import Names, Piece, Role, pieces_of
from moa.federated.refusals import (
    check_carry,
    check_common,
    check_products,
    check_ranks,
    check_senders,
    check_weights,
    common_factors,
    with_ratios,
)
from moa.federated.simulate import Federation
from moa.sections import ExpertConfig

KEYS = [f"experts.{name}.q.lora_{factor}.weight" for name in ("vqa", "line", "all") for factor in "AB"]
SHAPES = {key: (4, 7) if "lora_A" in key else (5, 4) for key in KEYS}
EXPERTS = {"vqa": ExpertConfig(), "line": ExpertConfig(), "all": ExpertConfig(gate="always")}
REST = Role(name="rest", match=["rest"])


def one(name: str = "vqa", **changes) -> tuple[list[Role], list[Piece]]:
    roles = [Role(name="one", match=[f"experts:{name}"], **changes), REST]
    return roles, pieces_of(SHAPES, roles, Names())


@pytest.mark.parametrize("rule", ["svd", "merge:linear"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "adapter", "targets": ["mlp"]}, "roles.one.rule: .* is of updates B A, and vqa is none"),
        ({"rank_gates": "task"}, "roles.one.rule: .* is of updates B A, and vqa has a gate for each rank"),
    ],
)
def test_a_rule_of_products_needs_experts_that_are(rule, changes, message):
    roles, pieces = one(rule=rule)
    check_products(roles, pieces, EXPERTS)
    with pytest.raises(ValueError, match=message):
        check_products(roles, pieces, EXPERTS | {"vqa": ExpertConfig(**changes)})


def test_carry_is_of_experts_that_are_always_on_by_the_ratio_of_their_scalings():
    always, into = ExpertConfig(gate="always"), ExpertConfig(gate="always", frozen=True)
    scalings = [{"all": 2.0, "carry": 0.5}, {"all": 2.0}, {}]

    def check(source="all", ratio=4.0, carry=into, name="carry", **changes):
        roles, pieces = one(source, rule="carry", into=name, options={"ratio": ratio})
        keys = [key.replace("all", "carry") for key in changes.get("keys", KEYS)]
        check_carry(roles, pieces, EXPERTS | {"all": always, "carry": carry}, keys, scalings)

    check()
    with pytest.raises(ValueError, match="options.ratio: must be 4, the scaling of all over that of carry, got 1.0"):
        check(ratio=1.0)
    with pytest.raises(ValueError, match="both experts need gate: always, and vqa has routed"):
        check("vqa")
    with pytest.raises(ValueError, match="both experts need gate: always, and carry has routed"):
        check(carry=ExpertConfig(frozen=True))
    with pytest.raises(ValueError, match="roles.one.into: no expert 'x'; choices: vqa, line, all, carry"):
        check(name="x")
    with pytest.raises(ValueError, match="roles.one.into: carry has no experts.carry.q.lora_A.weight"):
        check(keys=[])


def test_the_ratio_of_carry_and_stack_is_that_of_the_scalings():
    scalings = [{"all": 2.0}, {"all": 2.0, "carry": 0.5}]
    for rule in ("carry", "stack"):
        roles, pieces = one("all", rule=rule, into="carry")
        assert [role.options for role in with_ratios(roles, pieces, scalings)] == [{"ratio": 4.0}, {}]
        roles, pieces = one("all", rule=rule, into="carry", options={"ratio": 1.0})
        assert with_ratios(roles, pieces, scalings)[0].options == {"ratio": 1.0}
    always, into = ExpertConfig(gate="always", init="random_b"), ExpertConfig(gate="always", frozen=True)
    roles, pieces = one("all", rule="stack", into="carry", options={"ratio": 4.0})
    with pytest.raises(ValueError, match="roles.one.rule: stack begins each round with B of 0, and experts.all.init"):
        check_carry(roles, pieces, {"all": always, "carry": into}, [k.replace("all", "carry") for k in KEYS], scalings)


def test_a_factor_of_several_experts_is_in_a_role_of_all_of_them():
    shared, prefix = torch.zeros(4, 7), "base_model.model.q.lora"
    own = {n: [(f"{prefix}_A.weight", shared), (f"{prefix}_B.weight", torch.zeros(5, 4))] for n in ("vqa", "line")}
    common = common_factors(own)
    assert common == [["experts.vqa.q.lora_A.weight", "experts.line.q.lora_A.weight"]]
    shapes = {key: shape for key, shape in SHAPES.items() if key != common[0][1]}
    for matches in (["experts:vqa"], ["experts:vqa.A"]):
        roles = [Role(name="one", match=matches), REST]
        with pytest.raises(
            ValueError, match=r"roles.one.match: vqa and line have one lora_A.* give experts:\*.A a role"
        ):
            check_common(roles, pieces_of(shapes, roles, Names()), shapes, common)
    each = [Role(name=name, match=[f"experts:{name}.B"]) for name in ("vqa", "line")]
    for roles in ([Role(name="A", match=["experts:*.A"]), *each, REST], [REST], [*each, REST]):
        check_common([*roles], pieces_of(shapes, roles[:-1] + [REST], Names()), shapes, common)


def test_a_client_of_a_lower_rank_has_no_expert_that_subtracts_a_start():
    special = {"client-0": ClientConfig(), "client-1": ClientConfig(rank=2)}
    check_ranks(special, EXPERTS | {"x": ExpertConfig(init="svd_top", frozen=True)})
    check_ranks({"client-0": ClientConfig()}, {"x": ExpertConfig(init="random_b")})
    for init in ("random_b", "svd_top"):
        with pytest.raises(ValueError, match=f"clients.client-1.rank: experts.x.init={init} subtracts a start"):
            check_ranks(special, {"x": ExpertConfig(init=init)})
    with pytest.raises(ValueError, match=r"client-1.rank: roles.x.rule=merge:ties merges changes of all ranks"):
        check_ranks(special, {}, [Role(name="x", match=["rest"], rule="merge:ties")])


def test_answer_tokens_are_no_weight_of_a_model_that_compares():
    roles, _ = one(weight="answer_tokens")
    check_weights(roles, compares=False)
    with pytest.raises(ValueError, match="roles.one.weight: a CLIP compares and has no answer tokens"):
        check_weights(roles, compares=True)


def test_a_rule_needs_its_clients_in_a_round_and_a_scope_per_task_clients_of_one():
    senders = {"one": {f"client-{place}": ("vqa",) for place in range(5)}}
    krum, task = (one(rule="krum", weight="uniform")[0], one(scope="per_task")[0])
    check_senders(krum, senders, drawn=5)
    for own, drawn in ((senders, 4), ({}, 5)):
        with pytest.raises(ValueError, match="roles.one.rule: krum needs 5 clients .* a round has at most"):
            check_senders(krum, own, drawn=drawn)
    apart = one(rule="krum", weight="uniform", scope="per_client")[0]
    with pytest.raises(ValueError, match="a round has at most 1"):
        check_senders(apart, senders, drawn=5)
    check_senders(task, senders, drawn=5)
    senders["one"]["client-3"] = ("line", "vqa")
    with pytest.raises(ValueError, match="roles.one.scope: per_task, and client-3 has the tasks line, vqa"):
        check_senders(task, senders, drawn=5)


def test_the_table_at_the_end_has_each_client_at_its_own_rank(monkeypatch, tmp_path):
    tensors, above = {"x": torch.ones(2)}, (Piece(key="x", shape=(1,), role="", axis=0, start=1, stop=2),)
    row, seen = Row(tag=Tag(source="vqa", index=0, image="", task="vqa")), []
    for name in ("with_eval", "own_of", "summary", "write_json", "client_heat_map"):
        monkeypatch.setattr(matrix, name, lambda *arguments, **options: {})
    monkeypatch.setattr(matrix, "score", lambda *given, read: seen.append(given[5:]) or {"vqa": float(len(seen))})
    federation = object.__new__(Federation)
    vars(federation).update(
        run=SimpleNamespace(eval=SimpleNamespace(sources={"vqa": None}), out=str(tmp_path)),
        config=SimpleNamespace(federated=SimpleNamespace(num_questions=2, rounds=1, arrives={}, leaves={})),
        state=SimpleNamespace(server=SimpleNamespace(tensors=tensors), history=()),
        clients=[Client(name=f"client-{place}", train=(row,)) for place in range(3)],
        roles=(),
        delivered=lambda client: tensors,
        assignment=lambda client, round_: Assignment(
            sends=(), keeps=(), free={}, above=above if client.name != "client-0" else ()
        ),
        show=lambda values: None,
    )
    rows = matrix.score_clients(federation)["rows"]
    assert len(seen) == 3 and seen[2] == (above,)
    assert rows["client-1"]["scores"] == rows["client-2"]["scores"] == {"vqa": 3.0}
