"""Scores against loops, and their use by both kinds of router."""

import math

import pytest
import torch
import torch.nn.functional as F

from moa.routing.kinds import KINDS
from moa.routing.roles import Roles
from moa.routing.router import Evidence, Router, TableRouter
from moa.routing.routing import Routing
from moa.routing.scores import SCORES


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def centred(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    spread = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + 1e-5)
    return [(value - mean) / spread for value in row]


def by_loops(score: str, x: list[float], rows: list[list[float]]) -> list[float]:
    if score in ("linear", "attention"):
        return [dot(x, row) for row in rows]
    if score == "arrow":
        return [abs(dot(x, row)) for row in rows]
    if score == "ln_cosine":
        return [dot(centred(x), centred(row)) / math.sqrt(len(x)) for row in rows]
    temperature = min(100.0, math.sqrt(sum(dot(row, row) for row in rows) / len(rows)))
    return [temperature * dot(x, row) / math.sqrt(dot(x, x) * dot(row, row)) for row in rows]


@pytest.mark.parametrize("size", [0.1, 3.0, 1000.0])
@pytest.mark.parametrize("score", SCORES)
def test_a_score_is_its_formula(score, size):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 7, generator=generator, dtype=torch.float64) * size for n in (6, 4))
    for row, found in zip(x.tolist(), SCORES[score](x, weight).tolist(), strict=True):
        assert found == pytest.approx(by_loops(score, row, weight.tolist()), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("score", ["cosine", "ln_cosine"])
def test_the_length_of_the_features_does_not_matter_and_nothing_is_no_nan(score):
    x, weight = torch.randn(6, 7), torch.randn(4, 7)
    torch.testing.assert_close(SCORES[score](100 * x, weight), SCORES[score](x, weight), atol=1e-3, rtol=1e-3)
    x = torch.zeros(1, 7, requires_grad=True)
    SCORES[score](x, weight.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_the_last_layer_of_a_router_is_the_score_and_all_of_it_learns(score):
    torch.manual_seed(0)
    router = Router(experts=3, sites=1, evidence=("task",), dims={}, num_tasks=4, hidden=8, score=score)
    torch.nn.init.normal_(router.head[-1].weight)
    read = []
    router.head[2].register_forward_hook(lambda *args: read.append(args[-1]))
    logits = router(Evidence(task_ids=torch.tensor([0, 1, 2, 3, -1])))
    torch.testing.assert_close(logits[:, 0], SCORES[score](read[0], router.head[-1].weight))
    logits.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())
    assert (router.head[-1].bias is None) == (score != "linear")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.per_token])
def test_a_token_router_has_the_score_and_a_learned_threshold_stays_linear(score, kind):
    model = Routing(roles=Roles(("a", "b", "c"), ("routed",) * 3), kind=kind, granularity="token", score=score)
    x, weight = torch.randn(2, 5, 7), torch.randn(3 + model.learned_threshold, 7)
    columns = model.token_logits(x, weight)
    torch.testing.assert_close(columns[..., :3], SCORES[score](x, weight[:3]))
    torch.testing.assert_close(columns[..., 3:], F.linear(x, weight[3:]))
    assert model.token_gates(columns).shape == (2, 5, 3)


@pytest.mark.parametrize("per_site", [False, True])
def test_a_table_has_the_logits_of_each_task_and_equal_ones_where_it_is_unknown(per_site):
    router = TableRouter(experts=3, sites=5, num_tasks=4, per_site=per_site)
    ids = torch.tensor([2, -1, 0])
    assert router(Evidence(task_ids=ids)).shape == (3, 5 if per_site else 1, 3)
    torch.nn.init.normal_(router.table)
    logits = router(Evidence(task_ids=ids))
    for sample, task in enumerate(ids.tolist()):
        assert logits[sample].equal(router.table[:, task] if task >= 0 else torch.zeros_like(router.table[:, 0]))
    assert router(Evidence(task_ids=ids), withhold=["task"]).eq(0).all()
    logits[:, :, 0].sum().backward()
    assert router.table.grad[:, [0, 2], 0].eq(1).all() and router.table.grad.sum() == 2 * len(router.table)


def test_a_table_keeps_its_precision_and_hides_tasks_in_training_alone():
    router = TableRouter(experts=2, sites=1, num_tasks=1, modality_dropout=0.3).bfloat16()
    assert router.table.dtype == torch.float32
    torch.nn.init.ones_(router.table)
    evidence = Evidence(task_ids=torch.zeros(4000, dtype=torch.long))
    assert router.eval()(evidence).eq(1).all()
    torch.manual_seed(0)
    assert router.train()(evidence).mean().item() == pytest.approx(0.7, abs=0.03)
