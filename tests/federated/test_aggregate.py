"""A round at the server: who moves what, what is refused, and what equals central training."""

from dataclasses import replace

import pytest
import torch

from moa.federated.aggregate import Server, Update, aggregate, check_roles, deliver, digest_of
from moa.federated.pieces import Names, Role, pieces_of
from moa.federated.store import Arrival, StoredUpdates, incoming, save_arrival

NAMES = Names(choices=("vqa", "ocr"), evidence=("image", "ocr"))
ROLES = (
    Role(name="ocr", match=["experts:ocr", "router:evidence=ocr"], clients="has:ocr"),
    Role(name="rest", match=["rest"]),
)
SHAPES = {
    "experts.vqa.q.lora_A.weight": (2, 7),
    "experts.vqa.q.lora_B.weight": (5, 2),
    "experts.ocr.q.lora_A.weight": (2, 7),
    "experts.ocr.q.lora_B.weight": (5, 2),
    "router.head.1.weight": (3, 4),
}
A, B = "experts.vqa.q.lora_A.weight", "experts.vqa.q.lora_B.weight"
PAIRS = (Role(name="vqa", match=["experts:vqa"]), Role(name="other", match=["rest"]))


def randoms(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=g) for key, shape in SHAPES.items()}


def server(**more) -> Server:
    return Server(round=3, tensors=randoms(0) | more)


def update(number: int, roles=ROLES, sends=("ocr", "rest"), start: Server | None = None, **changes) -> Update:
    own = randoms(100 + number)
    pieces = pieces_of(SHAPES, roles, NAMES)
    values = {piece.name: piece.of(own).clone() for piece in pieces if piece.role in sends}
    counts = {name: {"samples_of_role": number + 1, "samples": 10 * (number + 1)} for name in sends}
    made = {"client": f"c{number}", "round": 3, "base": (start or server()).base(), "values": values}
    modalities = ("ocr",) if "ocr" in sends else ()
    return Update(**{**made, "counts": counts, "modalities": modalities, **changes})


def run(updates, roles=ROLES, start: Server | None = None):
    return aggregate(start or server(), updates, roles, pieces_of(SHAPES, roles, NAMES))


def changed(role: Role = ROLES[1], **changes) -> tuple[Role, Role]:
    return (ROLES[0], replace(role, **changes))


def test_each_piece_has_its_own_denominator():
    new, report = run([update(0), update(1, sends=("rest",)), update(2)])
    own = [randoms(100 + k) for k in range(3)]
    torch.testing.assert_close(new.tensors[A], (own[0][A] + 2 * own[1][A] + 3 * own[2][A]) / 6)
    key = "experts.ocr.q.lora_A.weight"
    torch.testing.assert_close(new.tensors[key], (own[0][key] + 3 * own[2][key]) / 4)
    head = "router.head.1.weight"
    columns = (own[0][head] + 3 * own[2][head])[:, 2:] / 4
    torch.testing.assert_close(new.tensors[head][:, 2:], columns)
    assert report.roles["ocr", ""].contributors == ("c0", "c2") and report.roles["ocr", ""].weight == 4
    assert new.round == 4 and not report.refused and not report.unmoved


def test_what_nobody_trained_is_bit_identical():
    start = server()
    new, report = run([update(k, sends=("rest",)) for k in range(3)])
    for piece in pieces_of(SHAPES, ROLES, NAMES):
        same = torch.equal(piece.of(new.tensors), piece.of(start.tensors))
        assert same == (piece.role == "ocr")
    assert report.unmoved == ("ocr",)
    nothing, _ = run([])
    assert all(torch.equal(nothing.tensors[key], start.tensors[key]) for key in SHAPES)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean", "geometric_median", "sum"])
def test_one_client_is_itself(rule):
    weight = "uniform" if rule in ("median", "trimmed_mean", "sum") else "samples_of_role"
    new, _ = run([update(4, sends=("rest",))], changed(rule=rule, weight=weight))
    assert torch.equal(new.tensors[A], randoms(104)[A])


def test_a_control_variate_moves_by_what_the_clients_steps_were_over_all_clients():
    roles = (replace(PAIRS[0], server="scaffold", server_options={"clients": 4.0}), PAIRS[1])
    start, c = server(), torch.randn(2, 7)
    start = replace(start, state={f"/{A}": {"c": c}})
    own = [update(k, roles, ("vqa",)) for k in range(2)]
    rates = [{"samples_of_role": 1, "rates of experts": rate} for rate in (0.5, 0.2)]
    own = [replace(u, counts={"vqa": counts}) for u, counts in zip(own, rates, strict=True)]
    new, report = run(own, roles, start)
    ends = [randoms(100 + k)[A] for k in range(2)]
    changes = [(start.tensors[A] - end) / rate - c for end, rate in zip(ends, (0.5, 0.2), strict=True)]
    torch.testing.assert_close(new.state[f"/{A}"]["c"], c + (changes[0] + changes[1]) / 4)
    torch.testing.assert_close(new.tensors[A], (ends[0] + ends[1]) / 2)
    assert f"/{B}" in new.state and not report.refused
    idle = replace(own[0], counts={"vqa": rates[0] | {"rates of experts": 0.0}})  # it did no step of the part
    assert torch.equal(run([idle], roles, start)[0].state[f"/{A}"]["c"], c)
    _, report = run([replace(own[0], counts={"vqa": {"samples_of_role": 1}})], roles, start)
    assert report.refused == (("c0", "vqa needs a count of rates of experts that is 0 or more, got None"),)
    with pytest.raises(ValueError, match="roles.vqa.server: scaffold is of a mean over all clients"):
        run(own, (replace(roles[0], clients="owners"), roles[1]), start)


@pytest.mark.parametrize("weight", ["samples_of_role", "uniform"])
@pytest.mark.parametrize("rule", ["mean", "geometric_median", "svd"])
def test_the_order_of_clients_does_not_matter(rule, weight):
    roles = (replace(PAIRS[0], rule=rule, weight=weight), PAIRS[1])
    own = [update(k, roles, ("vqa", "other")) for k in range(5)]
    one, other = run(own, roles)[0], run(own[::-1], roles)[0]
    for key in SHAPES:
        torch.testing.assert_close(one.tensors[key], other.tensors[key], rtol=3e-7, atol=1e-7)


def test_a_client_without_samples_of_a_role_does_not_matter():
    empty = update(3, sends=("rest",))
    empty = replace(empty, counts={"rest": {"samples_of_role": 0}})
    new, report = run([update(0), empty])
    assert torch.equal(new.tensors[A], run([update(0)])[0].tensors[A]) and not report.refused


def test_a_weight_of_0_in_one_role_leaves_the_others_of_an_update():
    roles = (replace(ROLES[0], weight="gate_mass"), ROLES[1])
    own = update(1, roles)
    own = replace(own, counts={**own.counts, "ocr": {"samples_of_role": 2, "gate_mass": 0.0}})
    new, report = run([own], roles)
    assert torch.equal(new.tensors[A], own.values[A]) and not report.refused and report.unmoved == ("ocr",)
    _, report = run([replace(own, values={A: own.values[A]})], roles)
    assert "pieces are missing" in report.refused[0][1]


def test_too_few_clients_for_a_rule_leave_the_role_as_it_was_and_are_reported():
    roles = changed(rule="krum", weight="uniform")
    for count in (4, 5):
        new, report = run([update(k, roles) for k in range(count)], roles)
        assert torch.equal(new.tensors[A], server().tensors[A]) == (count < 5)
        assert report.unmoved == (("rest",) if count < 5 else ()) and ("ocr", "") in report.roles


def test_clients_with_one_sgd_step_are_one_central_step():
    """Linear regression on unequal shares: the mean by samples of one step each is a step on the union."""
    torch.manual_seed(0)
    x, y, lr, start = torch.randn(12, 7), torch.randn(12, 2), 0.1, server()

    def step(rows: slice) -> torch.Tensor:
        weight = start.tensors[A].clone().requires_grad_()
        (x[rows] @ weight.T - y[rows]).square().mean().backward()
        return (weight - lr * weight.grad).detach()

    shares = [slice(0, 2), slice(2, 5), slice(5, 12)]
    clients = []
    for number, rows in enumerate(shares):
        own = update(number, sends=("rest",))
        values = {p.name: p.of(start.tensors) for p in pieces_of(SHAPES, ROLES, NAMES) if p.role == "rest"}
        count = {"rest": {"samples_of_role": rows.stop - rows.start}}
        clients.append(replace(own, values={**values, A: step(rows)}, counts=count))
    new, _ = run(clients)
    torch.testing.assert_close(new.tensors[A], step(slice(0, 12)), rtol=1e-6, atol=1e-7)
    assert torch.equal(new.tensors[B], start.tensors[B])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round": 2}, "of round 2, and this is 3"),
        ({"base": "0"}, "trained from other values"),
        ({"client": "c0"}, "a second update of this client"),
        ({"counts": {"x": {"samples_of_role": 1}}}, r"x is no role; choices: \['ocr', 'rest'\]"),
        ({"counts": {"rest": {"samples": 1}}}, "rest needs a count of samples_of_role .* got None"),
        ({"counts": {"rest": {"samples_of_role": -1}}}, "rest needs a count .* got -1"),
        ({"counts": {"rest": {"samples_of_role": float("nan")}}}, "rest needs a count .* got nan"),
        ({"modalities": ()}, "ocr is trained by has:ocr alone"),
        ({"counts": {"rest": {"samples_of_role": 1}}}, "3 pieces are of no role that it counts, such as .*ocr"),
        ({"digest": "0"}, "torn: the values are not those of its digest"),
    ],
)
def test_a_wrong_update_is_refused_whole_with_the_reason(change, said):
    new, report = run([update(0), replace(update(1), **change)])
    ((client, reason),) = report.refused
    assert client == change.get("client", "c1")
    with pytest.raises(ValueError, match=said):
        raise ValueError(reason)
    alone, _ = run([update(0)])
    assert all(torch.equal(new.tensors[key], alone.tensors[key]) for key in SHAPES)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "torn: 1 of 6 pieces are missing, such as experts.vqa.q.lora_A.weight"),
        (torch.full((2, 7), torch.nan), "A.weight is not finite"),
        (torch.full((2, 7), -torch.inf), "A.weight is not finite"),
        (torch.zeros(2, 7, dtype=torch.int64), "A.weight is not finite"),
        (torch.zeros(7, 2), r"has the shape \(7, 2\), must be \(2, 7\)"),
    ],
)
def test_wrong_values_are_refused(value, said):
    own = update(1)
    values = {key: v for key, v in own.values.items() if key != A} | ({} if value is None else {A: value})
    new, report = run([replace(own, values=values)])
    with pytest.raises(ValueError, match=said):
        raise ValueError(report.refused[0][1])
    assert torch.equal(new.tensors[A], server().tensors[A])


def test_a_refused_client_may_send_again():
    _, report = run([update(1, base="0"), update(1)])
    assert len(report.refused) == 1 and report.roles["rest", ""].contributors == ("c1",)


def test_an_update_with_its_digest_is_accepted():
    own = update(0)
    _, report = run([replace(own, digest=digest_of(own.values))])
    assert not report.refused


def test_updates_are_read_from_their_files_when_it_is_their_turn(tmp_path):
    own = [update(k) for k in range(2)]
    for one in own:
        stored = save_arrival(tmp_path, 3, Arrival(client=one.client, steps=1, update=one)).update
        assert all(torch.equal(value, one.values[name]) for name, value in stored.values.items())
    updates = StoredUpdates(run=tmp_path, round=3, clients=["c0", "c1"])
    new, _ = run(updates)
    assert all(torch.equal(tensor, run(own)[0].tensors[key]) for key, tensor in new.tensors.items())
    left = iter(updates)
    next(left)
    (incoming(tmp_path, 3) / "c1" / "values.safetensors").write_bytes(b"half")
    with pytest.raises(OSError, match="c1: torn"):
        next(left)


@pytest.mark.parametrize("others", [("rest",), ("ocr", "rest")])
def test_an_update_whose_change_is_far_larger_than_the_others_is_refused_whole(others):
    clients = [update(k, sends=others) for k in range(5)]
    start = server().tensors
    large = {p.name: p.of(start) + 9 * (p.of(randoms(105)) - p.of(start)) for p in pieces_of(SHAPES, ROLES, NAMES)}
    wrong = update(5, sends=("ocr", "rest"))
    wrong = replace(wrong, values={name: large[name] for name in wrong.values})
    roles, pieces = ROLES, pieces_of(SHAPES, ROLES, NAMES)
    new, report = aggregate(server(), [wrong, *clients], roles, pieces, screen=5)
    ((client, reason),) = report.refused
    assert client == "c5" and "times the median of the others" in reason
    alone, _ = aggregate(server(), clients, roles, pieces, screen=5)
    assert all(torch.equal(new.tensors[key], alone.tensors[key]) for key in SHAPES)
    assert len(aggregate(server(), [wrong, *clients], roles, pieces)[1].refused) == 0


def test_the_base_names_values_and_scopes():
    assert server().base() == server().base()
    assert server(**{A: torch.zeros(2, 7)}).base() != server().base()
    assert replace(server(), scoped={"task:a": {A: torch.zeros(2, 7)}}).base() != server().base()


@pytest.mark.parametrize("scope", ["per_task", "per_group", "per_client"])
def test_scopes_move_apart_and_are_delivered_to_their_own(scope):
    roles = changed(scope=scope)
    own = [update(k, sends=("rest",), tasks=(f"t{k % 2}",), group=f"g{k % 2}") for k in range(3)]
    new, report = run(own, roles)
    assert torch.equal(new.tensors[A], server().tensors[A])
    name = {"per_task": "task:t1", "per_group": "group:g1", "per_client": "client:c1"}[scope]
    got = deliver(new, roles, pieces_of(SHAPES, roles, NAMES), ["task:t1", "group:g1", "client:c1"])
    assert report.roles["rest", name].contributors == ("c1",) and torch.equal(got[A], randoms(101)[A])
    start = deliver(new, roles, pieces_of(SHAPES, roles, NAMES), ["client:new"])
    assert torch.equal(start[A], server().tensors[A])


def test_clients_take_from_their_nearest_others():
    roles = changed(scope="per_client", transfer={"own": 0.7, "nearest": 1.0})
    near = [replace(update(0, sends=("rest",)), client=name) for name in ("a", "b")]
    near[1] = replace(near[1], values={key: value + 0.01 for key, value in near[1].values.items()})
    new, report = run([*near, update(7, sends=("rest",))], roles)
    assert report.transfers["rest"]["a"] == pytest.approx({"a": 0.7, "b": 0.3, "c7": 0})
    torch.testing.assert_close(new.scoped["client:a"][A], near[0].values[A] + 0.003)
    alone, report = run([near[0]], roles)
    assert torch.equal(alone.scoped["client:a"][A], near[0].values[A]) and report.transfers["rest"] == {"a": {"a": 1.0}}
    assert run([], roles, server())[1].transfers == {"rest": {}}
    # who has not trained in a round stays, and others take from it
    sent = replace(update(1, sends=("rest",)), round=new.round, base=new.base())
    later, report = run([sent], roles, new)
    assert report.transfers["rest"].keys() == {"c1"}
    assert torch.equal(later.scoped["client:a"][A], new.scoped["client:a"][A])
    assert not torch.equal(later.scoped["client:c1"][A], sent.values[A])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": {"own": 0.5}}, "transfer: mixes what clients send of a role with scope per_client"),
        ({"transfer": {"own": 1.5}, "scope": "per_client"}, "transfer: has own in 0..1, nearest in 1.."),
        ({"transfer": {"near": 1.0}, "scope": "per_client"}, "got near=1.0"),
        ({"transfer": {"nearest": 1.5}, "scope": "per_client"}, "nearest a whole number; got nearest=1.5"),
    ],
)  # fmt: skip
def test_a_transfer_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_large_finite_values_are_finite():
    own = update(1)
    _, report = run([replace(own, values={**own.values, A: torch.full((2, 7), 3e38)})])
    assert not report.refused


def test_a_client_of_several_tasks_has_no_value_per_task():
    _, report = run([update(0, tasks=("a", "b"))], changed(scope="per_task"))
    assert "rest is per task, and the client has the tasks ['a', 'b']" in report.refused[0][1]


def test_a_kept_role_is_never_taken():
    _, report = run([update(0)], changed(keep=True))
    assert report.refused == (("c0", "rest is kept local"),) and report.unmoved == ("ocr",)


def test_clipping_bounds_a_clients_change_of_a_role():
    new, report = run([update(0, sends=("rest",))], changed(clip=0.5))
    pieces = [p for p in pieces_of(SHAPES, ROLES, NAMES) if p.role == "rest"]
    change = torch.cat([(p.of(new.tensors) - p.of(server().tensors)).flatten() for p in pieces])
    whole = torch.cat([(p.of(randoms(100)) - p.of(server().tensors)).flatten() for p in pieces])
    torch.testing.assert_close(change, 0.5 * whole / whole.norm(), rtol=1e-4, atol=1e-5)
    before = torch.cat([p.of(server().tensors).flatten() for p in pieces])
    assert report.roles["rest", ""].moved == pytest.approx(float(change.norm() / before.norm()), rel=1e-5)


def test_a_server_optimiser_has_its_state_per_piece_and_keeps_it_where_nobody_trained():
    roles = changed(server="momentum", server_options={"beta": 0.5})
    first, _ = run([update(0)], roles)
    assert A in {key.removeprefix("/") for key in first.state}
    torch.testing.assert_close(first.tensors[A], randoms(100)[A])
    still = replace(first, round=3)
    second, _ = run([update(1, start=still)], roles, still)
    step = 0.5 * (randoms(100)[A] - server().tensors[A]) + randoms(101)[A] - randoms(100)[A]
    torch.testing.assert_close(second.tensors[A], first.tensors[A] + step, rtol=1e-5, atol=1e-5)
    nobody, _ = run([], roles, still)
    assert nobody.state == first.state


@pytest.mark.parametrize("rule", ["svd", "merge:linear"])
def test_pairs_of_factors_by_the_table(rule):
    roles = (replace(PAIRS[0], rule=rule), PAIRS[1])
    own = [update(k, roles, ("vqa", "other")) for k in range(2)]
    new, report = run(own, roles)
    exact = sum((k + 1) * u.values[B].double() @ u.values[A].double() for k, u in enumerate(own)) / 3
    u, s, v = torch.linalg.svd(exact)
    best = (u[:, :2] * s[:2] @ v[:2]).float()
    torch.testing.assert_close(new.tensors[B] @ new.tensors[A], best, rtol=1e-5, atol=1e-5)
    said = report.roles["vqa", ""]
    mean = sum((k + 1) * u.values[B] for k, u in enumerate(own)) @ sum((k + 1) * u.values[A] for k, u in enumerate(own))
    assert said.lost == pytest.approx(float(s[2:].square().sum()), rel=1e-6)
    assert said.covariance == pytest.approx(float((exact - mean / 9).norm() / exact.norm()), rel=1e-5)


@pytest.mark.parametrize("begun", [0.0, 1.0])
def test_a_merge_by_the_mean_is_fedavg_where_all_share_a_factor(begun):
    start = server(**{B: begun * randoms(0)[B]})
    found = []
    for rule in ("mean", "merge:linear"):
        roles = (replace(PAIRS[0], rule=rule), PAIRS[1])
        own = [update(k, roles, ("vqa", "other"), start) for k in range(3)]
        own = [replace(u, values={**u.values, A: start.tensors[A]}) for u in own]
        new, _ = run(own, roles, start)
        found.append(new.tensors[B] @ new.tensors[A])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_carry_puts_the_covariance_into_a_frozen_expert():
    roles = (replace(PAIRS[0], rule="carry", into="carry", options={"ratio": 2}), PAIRS[1])
    keys = [key.replace("vqa", "carry") for key in (A, B)]
    start = server(**{keys[0]: torch.zeros(5, 7), keys[1]: torch.zeros(5, 5)})
    own = [update(k, roles, ("vqa", "other"), start) for k in range(2)]
    new, _ = run(own, roles, start)
    exact = sum((k + 1) * u.values[B] @ u.values[A] for k, u in enumerate(own)) / 3
    carried = new.tensors[keys[1]] @ new.tensors[keys[0]]
    torch.testing.assert_close(2 * new.tensors[B] @ new.tensors[A] + carried, 2 * exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"roles.vqa.into: carry has no experts.carry.q.lora_A.weight"):
        run([update(k, roles, ("vqa", "other")) for k in range(2)], roles)


def test_stack_puts_the_whole_mean_update_into_a_frozen_expert_and_begins_again():
    roles = (replace(PAIRS[0], rule="stack", into="carry", options={"ratio": 2}), PAIRS[1])
    keys = [key.replace("vqa", "carry") for key in (A, B)]
    g = torch.Generator().manual_seed(1)
    start = server(**{key: torch.randn(shape, generator=g) for key, shape in zip(keys, ((5, 7), (5, 5)), strict=True)})
    own = [update(k, roles, ("vqa", "other"), start) for k in range(2)]
    new, _ = run(own, roles, start)
    exact = sum((k + 1) * u.values[B] @ u.values[A] for k, u in enumerate(own)) / 3
    before, carried = (state.tensors[keys[1]] @ state.tensors[keys[0]] for state in (start, new))
    torch.testing.assert_close(carried, before + 2 * exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(new.tensors[A], start.tensors[A]) and not new.tensors[B].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rule": "average"}, "rest.rule: must be one of"),
        ({"rule": "median"}, "rest.weight: median reads no weights; must be uniform, got 'samples_of_role'"),
        ({"server": "sgd"}, "rest.server: must be one of"),
        ({"rule": "svd", "server": "adam"}, "rest.server: adam steps along a change"),
        ({"into": "carry"}, "rest.into: the expert that rule=carry or rule=stack adds to"),
        ({"rule": "carry", "into": "vqa"}, "rest.into: needs scope=global and a frozen expert in no role"),
        ({"rule": "svd"}, r"rest.rule: svd needs both whole factors, got router.head.1.weight\[:,0:2\] alone"),
        ({"options": {"share": 0.2}}, "rest.options.share: no such option; it has none"),
        ({"server": "adam", "server_options": {"beta": 1.0}}, "server_options.beta: no such option; it has .*beta1"),
        (
            {"server": "adam", "server_options": {"beta1": 1.0}},
            "server_options.beta1: must be a number, below 1, got 1.0",
        ),
        ({"server": "yogi", "server_options": {"tau": 0.0}}, "server_options.tau: must be a number, above 0, got 0.0"),
        (
            {"server": "momentum", "server_options": {"lr": -1.0}},
            "server_options.lr: must be a number, above 0, got -1.0",
        ),
        ({"match": ["experts:vqa", "router:rest"], "rule": "svd"}, "needs both whole factors"),
        ({"rule": "trimmed_mean", "weight": "uniform", "options": {"share": "x"}}, r"rest.options.share: .* got 'x'"),
        (
            {"rule": "krum", "weight": "uniform", "options": {"wrong": 0.5}},
            "rest.options.wrong: must be a whole number",
        ),
        ({"rule": "krum", "weight": "uniform", "options": {"chosen": 0}}, "rest.options.chosen: must be a whole"),
    ],
)
def test_a_table_whose_settings_do_not_go_together_is_named(change, said):
    roles = changed(**change)
    with pytest.raises(ValueError, match=said):
        check_roles(roles, pieces_of(SHAPES, roles, NAMES))


@pytest.mark.parametrize(
    ("rule", "said"),
    [("tie", "no such method 'tie'"), ("lines", "lines reads more"), ("lego", "not defined in 'core'")],
)
def test_a_merge_that_no_role_can_have_is_named_before_the_round(rule, said):
    roles = (replace(PAIRS[0], rule=f"merge:{rule}"), PAIRS[1])
    with pytest.raises(ValueError, match=said):
        check_roles(roles, pieces_of(SHAPES, roles, NAMES))


def test_two_experts_that_add_to_one_are_named():
    both = Role(name="both", match=["experts:*"], rule="stack", into="carry")
    roles = (both, Role(name="router", match=["router"]))
    with pytest.raises(ValueError, match=r"roles: two experts add to experts.carry.q.lora_A.weight"):
        check_roles(roles, pieces_of(SHAPES, roles, NAMES))


@pytest.mark.parametrize("options", [{"ratio": "x"}, {"ratio": 0}])
@pytest.mark.parametrize("rule", ["carry", "stack"])
def test_the_ratio_of_scalings_is_above_0(rule, options):
    roles = (replace(PAIRS[0], rule=rule, into="carry", options=options), PAIRS[1])
    with pytest.raises(ValueError, match=r"roles.vqa.options.ratio: must be a number"):
        check_roles(roles, pieces_of(SHAPES, roles, NAMES))
