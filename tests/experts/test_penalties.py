"""Losses on experts: against their formulas over whole outputs, and in training with and without recomputation."""

from itertools import combinations

import pytest
import torch
from torch import nn

from moa.experts.penalties import PADDING, PENALTIES
from tests.support.toy import read_log, toy_config
from tests.test_train import run_once


def some(count: int = 3):
    torch.manual_seed(0)
    a = [torch.randn(rank, 6, dtype=torch.double, requires_grad=True) for rank in (2, 3, 1)[:count]]
    b = [torch.randn(5, len(own), dtype=torch.double, requires_grad=True) for own in a]
    x, tasks = torch.randn(40, 6, dtype=torch.double), torch.arange(40) % 4 - 1
    return a, b, x, tasks


def value(name, a, b, x, tasks):
    return PENALTIES[name](a, b, [x @ own.T for own in a], tasks)


def test_orthogonality_is_zero_for_rows_that_are_and_else_the_mean_square_of_their_products():
    a, b, x, tasks = some()
    pairs = [(one @ other.T).square().sum() / (len(one) * len(other)) for one, other in combinations(a, 2)]
    torch.testing.assert_close(value("orthogonality", a, b, x, tasks), sum(pairs) / 3)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double))[0]
    assert value("orthogonality", basis.split(2), b, x, tasks) < 1e-20


def test_difference_is_that_of_whole_outputs_without_padding():
    a, b, x, tasks = some()
    tasks[-10:] = PADDING
    outputs = [x[:-10] @ one.T @ other.T for one, other in zip(a, b, strict=True)]
    pairs = []
    for one, other in combinations(outputs, 2):
        sizes = one.square().sum() * other.square().sum()
        pairs.append((one.T @ other).square().sum() / sizes.detach())
    expected = sum(pairs) / 3
    found = value("difference", a, b, x, tasks)
    torch.testing.assert_close(found, expected)
    ours, wanted = (torch.autograd.grad(loss, [*a, *b]) for loss in (found, expected))
    torch.testing.assert_close(ours, wanted)
    for own in b:
        nn.init.zeros_(own)
    fresh = torch.autograd.grad(value("difference", a, b, x, tasks), [*a, *b])
    assert not any(grad.any() for grad in fresh)  # and none is NaN


def test_alignment_is_the_mean_divergence_of_normals_and_zero_for_tasks_that_are_alike():
    a, b, x, tasks = some(2)
    hidden = x @ torch.cat(a).T
    pairs = []
    for one, other in combinations(range(3), 2):
        normals = []
        for task in (one, other):
            own = hidden[tasks == task]
            normals.append(torch.distributions.Normal(own.mean(0), (own.var(0, unbiased=False) + 1e-6).sqrt()))
        p, q = normals
        pairs.append((torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).mean() / 2)
    torch.testing.assert_close(value("alignment", a, b, x, tasks), sum(pairs) / 3)
    alike = value("alignment", a, b, x[:10].repeat(4, 1), torch.arange(40) // 10)
    assert alike.abs() < 1e-9
    lone = value("alignment", a, b, x, torch.zeros(40, dtype=torch.long))
    assert lone == 0 and not any(g.any() for g in torch.autograd.grad(lone, a))


@pytest.mark.slow
def test_losses_on_experts_are_logged_fall_and_do_not_change_where_activations_are_recomputed(tmp_path):
    losses = {"orthogonality": 100.0, "difference": 0.1, "alignment": 0.1, "guidance": 0, "guidance_end": 0}
    stages = {"experts": {"steps": 4, "lr": {"experts": 0.01}, "lr_end": 1.0}}
    changes = {"losses": losses, "stages": stages, "train__save_every": 9, "train__micro_batch_size": 2}
    logs = []
    for recompute in (False, True):
        config = toy_config(
            tmp_path, out=str(tmp_path / str(recompute)), train__gradient_checkpointing=recompute, **changes
        )
        run_once(config)
        logs.append([line for line in read_log(config.out) if "loss" in line])
    assert logs[0] == logs[1]
    assert all({f"aux/{name}" for name in PENALTIES} <= set(line) for line in logs[0])
    assert logs[0][-1]["aux/orthogonality"] < logs[0][0]["aux/orthogonality"]
    assert logs[0][0]["aux/difference"] == 0 < logs[0][-1]["aux/difference"]
    assert logs[0][0]["aux/alignment"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"losses__orthogonality": 1, "experts__vqa__gate": "always"},
            "losses.orthogonality: has no effect, it needs two",
        ),
        ({"losses__alignment": 1, "stages": {"router": {"steps": 1}}}, "losses.alignment: no stage trains experts"),
        ({"losses__difference": 1, "experts__vqa__rank_gates": "task"}, "losses.difference: is of outputs B A x"),
    ],
)
def test_losses_on_experts_without_effect_are_refused_by_their_key(tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        toy_config(tmp_path, **changes)
    assert message in str(caught.value)
