"""Privacy of clients: what bounds one, how large the noise is, what is spent, and what is refused."""

import math
import sys

import numpy as np
import pytest
import torch

from moa.federated.aggregate import aggregate
from moa.federated.config import FederatedConfig
from moa.federated.pieces import Role, pieces_of
from moa.federated.privacy import Privacy, reads_single, secure_line, spent
from moa.federated.simulate import draw_clients
from tests.federated.test_aggregate import NAMES, SHAPES, randoms, server, update

ROLES = (
    Role(name="ocr", match=["experts:ocr", "router:evidence=ocr"], weight="uniform"),
    Role(name="rest", match=["rest"], weight="uniform"),
)
PIECES = pieces_of(SHAPES, ROLES, NAMES)
TABLE = [{"name": "all", "match": ["rest"], "weight": "uniform"}]


def private(clip: float, noise: float, expected: float, **more) -> Privacy:
    share = {piece.name: expected for piece in PIECES}
    return Privacy(clip=clip, noise=noise, expected=share, rng=np.random.default_rng(0), **more)


def change(new) -> torch.Tensor:
    return torch.cat([(p.of(new.tensors) - p.of(server().tensors)).double().flatten() for p in PIECES])


def test_a_clients_change_of_all_roles_together_is_clipped_and_divided_by_the_expected_number():
    own = [update(k, ROLES) for k in range(2)]
    new, _ = aggregate(server(), own, ROLES, PIECES, private=private(0.5, 0.0, 4.0))
    start = torch.cat([p.of(server().tensors).double().flatten() for p in PIECES])
    changes = [torch.cat([p.of(randoms(100 + k)).double().flatten() for p in PIECES]) - start for k in range(2)]
    expected = sum(0.5 * delta / delta.norm() for delta in changes) / 4
    torch.testing.assert_close(change(new), expected, rtol=1e-4, atol=1e-6)
    alone, _ = aggregate(server(), own[:1], ROLES, PIECES, private=private(0.5, 0.0, 4.0))
    assert float((change(new) - change(alone)).norm()) == pytest.approx(0.5 / 4, rel=1e-4)


def test_the_noise_has_its_variance_and_moves_what_nobody_has_sent():
    piece = PIECES[0]
    start, drawn = torch.zeros(300, 300), private(2.0, 3.0, 4.0)
    noise = drawn.value(piece.name, start, None, 0)
    assert float(noise.std()) == pytest.approx(3.0 * 2.0 / 4.0, rel=0.02) and abs(float(noise.mean())) < 0.02
    new, report = aggregate(server(), [], ROLES, PIECES, private=private(2.0, 3.0, 4.0))
    assert all(not torch.equal(p.of(new.tensors), p.of(server().tensors)) for p in PIECES) and not report.unmoved
    rests = Privacy(clip=2.0, noise=3.0, expected={}, rng=np.random.default_rng(0))
    new, _ = aggregate(server(), [update(0, ROLES)], ROLES, PIECES, private=rests)
    assert all(torch.equal(new.tensors[key], server().tensors[key]) for key in SHAPES)


def test_epsilon_is_that_of_the_gaussian_mechanism():
    pytest.importorskip("dp_accounting")
    # Renyi divergence alpha / (2 z^2), converted by Canonne et al. 2020 (arXiv 2004.00010), proposition 12
    delta, rounds = 1e-5, 4
    bounds = [rounds * a / 2 + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in range(2, 64)]
    assert spent(1.0, 1.0, rounds, delta) == pytest.approx(min(bounds), rel=1e-6)
    assert spent(1.0, 0.1, rounds, delta) < spent(1.0, 0.5, rounds, delta) < spent(1.0, 1.0, rounds, delta)


def test_without_the_accountant_a_private_federation_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match="privacy: needs the package dp-accounting"):
        spent(1.0, 1.0, 1, 1e-5)


def settings(**changes) -> FederatedConfig:
    from moa.cli.settings import load

    raw = {"privacy": {"clip": 1.0, "noise": 1.0}, "roles": TABLE, **changes}
    return load(FederatedConfig, None, [*raw.items()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"clip": 1.0}}, "privacy.noise: needs clip, and clip needs noise"),
        ({"privacy": {"clip": 1.0, "noise": 1.0, "delta": 0.1}}, "privacy.delta: must be below 1 / 10 clients"),
        ({"screen": 5.0}, "screen: compares clients"),
        ({"roles": []}, "roles: privacy needs a table"),
        ({"leaves": {"vqa": 1}}, "leaves: a client without data"),
        ({"roles": [{**TABLE[0], "rule": "median"}]}, r"roles.all.rule: privacy needs one of .*, got 'median'"),
        ({"roles": [{**TABLE[0], "weight": "samples"}]}, r"roles.all.weight: privacy needs one of .*, got 'samples'"),
        ({"roles": [{**TABLE[0], "scope": "per_task"}]}, r"roles.all.scope: privacy needs one of .*, got 'per_task'"),
    ],
)
def test_what_would_break_the_bound_on_one_client_is_named(changes, said):
    settings()
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_each_client_of_a_private_round_has_a_draw_of_its_own():
    config = settings(participation=0.3, partition={"clients": 40})
    sizes = [len(draw_clients(config, 7, round_)) for round_ in range(1, 101)]
    assert np.mean(sizes) == pytest.approx(12, abs=1) and len(set(sizes)) > 5


def test_what_could_run_under_secure_aggregation_is_said():
    table = {"mean": None, "sum": None, "median": "median reads", "svd": "svd reads", "stack": "stack reads"}
    for rule, reason in table.items():
        found = reads_single(Role(name="x", match=["rest"], rule=rule))
        assert found is None if reason is None else found.startswith(reason)
    rows = [Role(name="a", match=["rest"]), Role(name="b", match=["rest"], rule="krum")]
    assert secure_line(rows, []).endswith("would do for a; not for b (krum reads the values of each client)")
    assert "not for a (screen reads single updates)" in secure_line(rows[:1], ["screen reads single updates"])
