"""Groups of clients: hand values of the clusterings, and what a newcomer's update becomes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moa.cli.settings import load
from moa.federated.aggregate import RoundReport, Server, Update, aggregate
from moa.federated.config import FederatedConfig
from moa.federated.groups import (
    EVIDENCE,
    Groups,
    average_linkage,
    check_groups,
    kmeans,
    place_clients,
    regroup,
    silhouette,
)
from moa.federated.pieces import Names, Role, pieces_of
from moa.federated.simulate import lines_of
from tests.federated.test_simulation import finished, opened, settings

EXPERTS = ("vqa", "line", "caption")
SHAPES = {f"experts.{e}.q.lora_{f}.weight": (2, 3) if f == "A" else (4, 2) for e in EXPERTS for f in "AB"}
SHAPES |= {"router.head.3.weight": (3, 5)}
ROLES = [Role(name=f"expert {e}", match=[f"experts:{e}", f"router:row={e}"], clients="owners") for e in EXPERTS]
PIECES = pieces_of(SHAPES, ROLES, Names(choices=EXPERTS))
# directions of six clients: two and three of a kind, one by itself
ANGLES = {"a": 0.0, "b": 1.5, "c": 0.05, "d": 1.45, "e": 3.0, "f": 1.55}


def features(names=ANGLES) -> dict[str, torch.Tensor]:
    return {name: (1 + len(name)) * torch.tensor([np.cos(ANGLES[name]), np.sin(ANGLES[name])]) for name in names}


def together(groups: Groups) -> set[frozenset[str]]:
    return {frozenset(c for c, own in groups.of.items() if own == group) for group in groups.of.values()}


KINDS = {frozenset("ac"), frozenset("bdf"), frozenset("e")}


@pytest.mark.parametrize(("how", "likeness"), [("linkage", -1), ("kmeans", -1), ("leader", 0.9)])
def test_clients_that_are_alike_have_one_group_whatever_their_order(how, likeness):
    found = place_clients(Groups(), features(), EXPERTS, how, likeness)
    assert together(found) == KINDS
    assert (found.of["a"], found.of["b"], found.of["e"]) == EXPERTS
    other = place_clients(Groups(), features([*ANGLES][::-1]), EXPERTS, how, likeness)
    assert other.of == found.of and all(torch.equal(t, other.centres[n]) for n, t in found.centres.items())


def test_a_client_that_comes_later_joins_the_likest_group_or_begins_one_where_none_is_like_it():
    some = place_clients(Groups(), features("ac"), EXPERTS, "leader", 0.9)
    assert set(some.of.values()) == {"vqa"} and float(some.centres["vqa"][1]) == pytest.approx(np.sin(0.05))
    later = place_clients(some, features("bde"), EXPERTS, "leader", 0.9)
    assert together(later) == {frozenset("ac"), frozenset("bd"), frozenset("e")}
    full = place_clients(some, features("be"), EXPERTS[:2], "leader", 0.9)
    assert full.of["b"] == full.of["e"] == "line"  # no expert is left
    clustered = place_clients(some, features("e"), EXPERTS, "linkage")
    assert clustered.of["e"] == "vqa"


def test_the_number_of_groups_is_that_of_the_best_silhouette():
    rows = np.array([[1, 0.01 * n] for n in range(4)] + [[0.01 * n, 1] for n in range(4)])
    assert len(set(average_linkage(rows, 6))) == 2
    assert len(set(kmeans(rows, 2))) == 2 and len(set(average_linkage(rows[:1].repeat(2, 0), 4))) == 2
    apart = np.array([[0, 1, 4], [1, 0, 5], [4, 5, 0]], dtype=float)
    assert silhouette(apart, np.array([0, 0, 1])) == pytest.approx(((4 - 1) / 4 + (5 - 1) / 5 + 0) / 3)
    assert silhouette(apart, np.array([0, 0, 0])) == 0.0


def update(client: str, server: Server, **values: torch.Tensor) -> Update:
    """Of a newcomer, who trains the slot: `b` is its lora_B."""
    own = {piece.name: values.get(piece.key[-8], torch.ones(piece.shape)) for piece in PIECES[:2]}
    own |= {piece.name: torch.ones(piece.shape) for piece in PIECES if piece.role == "expert vqa" and piece.axis == 0}
    return Update(client=client, round=server.round, base=server.base(), values=own,
                  counts={"expert vqa": {"samples_of_role": 2}})  # fmt: skip


NONE = Groups()


def grouped(server: Server, updates, groups: Groups = NONE, by="lora_B", **options):
    names = [update.client for update in updates if update.client not in groups.of]
    options = {"how": "leader", "likeness": 0.9} | options
    return regroup(server, updates, names, groups, ROLES, PIECES, experts=EXPERTS, by=by, **options)


def test_what_founders_send_is_their_groups_and_what_a_later_one_sends_is_left_out():
    server = Server(round=1, tensors={key: torch.zeros(shape) for key, shape in SHAPES.items()})
    one, two = torch.ones(4, 2), torch.ones(4, 2) * torch.tensor([1.0, -1.0])
    sent = [update("a", server, B=one), update("b", server, B=two), update("c", server, B=3 * one)]
    updates, groups, refused = grouped(server, sent)
    assert groups.of == {"a": "vqa", "b": "line", "c": "vqa"} and not refused
    assert [own.group for own in updates] == ["vqa", "line", "vqa"]
    after, report = aggregate(server, updates, ROLES, PIECES)
    assert report.refused == () and report.unmoved == ("expert caption",)
    assert torch.equal(after.tensors["experts.vqa.q.lora_B.weight"], 2 * one)
    assert torch.equal(after.tensors["experts.line.q.lora_B.weight"], two)
    assert torch.equal(after.tensors["router.head.3.weight"][:, 0], torch.tensor([1.0, 1.0, 0.0]))
    updates, later, refused = grouped(after, [update("d", after, B=two)], groups)
    assert later.of["d"] == "line" and updates[0].values == {} == updates[0].counts
    last, report = aggregate(after, updates, ROLES, PIECES)
    assert report.refused == () and all(torch.equal(t, after.tensors[k]) for k, t in last.tensors.items())


def test_a_newcomer_that_cannot_be_averaged_or_compared_forms_no_group():
    server = Server(round=1, tensors={key: torch.zeros(shape) for key, shape in SHAPES.items()})
    sent = [replace(update("a", server), base="other"), update("b", server, B=torch.zeros(4, 2)), update("c", server)]
    updates, groups, refused = grouped(server, sent)
    assert groups.of == {"c": "vqa"} and [own.client for own in updates] == ["c"]
    assert "other values" in dict(refused)["a"] and "lora_B" in dict(refused)["b"]
    evidence = [replace(u, values={**u.values, EVIDENCE: torch.full((3,), x)}, base=server.base())
                for u, x in zip(sent, (1.0, torch.nan, 1.0), strict=True)]  # fmt: skip
    updates, groups, refused = grouped(server, [*evidence, update("d", server)], by="evidence")
    assert groups.of == {"a": "vqa", "c": "vqa"} and {name for name, _ in refused} == {"b", "d"}
    assert all(EVIDENCE not in own.values for own in updates)


def test_experts_of_groups_have_roles_of_the_same_pieces():
    check_groups(EXPERTS, ROLES, PIECES)
    both = [Role(name="all", match=["experts:*"]), Role(name="router", match=["router"])]
    with pytest.raises(ValueError, match="roles.all has the experts vqa and line, which are of two groups"):
        check_groups(EXPERTS, both, pieces_of(SHAPES, both, Names(choices=EXPERTS)))
    other = SHAPES | {"experts.line.q.lora_B.weight": (5, 2)}
    with pytest.raises(ValueError, match="groups: the experts vqa and line are of groups, and have not the same"):
        check_groups(EXPERTS, ROLES, pieces_of(other, ROLES, Names(choices=EXPERTS)))


@pytest.mark.slow
def test_clients_of_one_task_find_each_other_train_their_expert_alone_and_go_on_after_a_kill(tmp_path):
    own = [{"name": "expert {expert}", "match": ["experts:{expert}"], "clients": "owners", "elsewhere": "frozen"},
           {"name": "router", "match": ["router"], "scope": "per_group"}]  # fmt: skip
    table = {"rounds": 2, "partition": {"clients": 4, "how": "by_source"}, "roles": own, "num_questions": 0}
    table["groups"] = {"by": "evidence"}
    three = {name: {"rank": 2, "alpha": 4} for name in ("vqa", "grounding", "spare")}
    config = settings(tmp_path, tmp_path / "run", federated=table, experts=three)
    federation = opened(config)
    with federation.reporting():
        for arrival in federation.train_here(federation.waiting()):
            federation.store(arrival)
        federation.finish_round()
    again = finished(config, resume=True)
    tasks = {client.name: client.train[0].tag.task for client in again.training}
    groups = again.state.groups.of
    assert {groups[c] == groups[d] for c in groups for d in groups if tasks[c] == tasks[d]} == {True}
    first, last = again.state.history
    assert first["groups"]["vqa"] == [client for client in sorted(tasks) if tasks[client] == tasks["client-0"]]
    assert first["groups"]["spare"] == [] and again.idle == {"spare"} and "groups" not in last
    tensors, scoped = again.state.server.tensors, again.state.server.scoped
    moved = {
        name: any(bool(t.any()) for key, t in tensors.items() if f"{name}." in key and "lora_B" in key)
        for name in three
    }
    assert moved == {"vqa": True, "grounding": True, "spare": False}
    assert scoped.keys() == {"group:vqa", "group:grounding"}
    assert torch.equal(
        again.delivered(again.training[0])["router.head.3.weight"], scoped["group:vqa"]["router.head.3.weight"]
    )
    assert "the clients lack this expert" in "\n".join(
        lines_of(first, RoundReport(round=1, roles={}, refused=(), unmoved=()))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": {"by": "evidence", "how": "leader"}}, "groups.likeness: is of how=leader, which needs it"),
        ({"groups": {"how": "kmeans"}}, "groups.how: has no effect without federated.groups.by"),
        ({"clients": {"client-0": {"group": "x"}}}, "clients.client-0.group: has no effect without a role"),
        ({"roles": [{"name": "x", "match": ["rest"], "scope": "per_group"}]}, "roles: scope per_group of x needs"),
    ],
)  # fmt: skip
def test_a_setting_of_groups_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load(FederatedConfig, None, list(changes.items()))
