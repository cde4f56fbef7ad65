"""Gates of single ranks: the same numbers as a loop over ranks, gradients, restarts, and what refuses them."""

import pytest
import torch
from torch import nn

from moa.build import build_model
from moa.checkpoint import load_model
from moa.experts.bank import ExpertBank
from moa.experts.rank_gates import RankGates, task_shares, token_rank_gates
from moa.experts.ties import Ties
from moa.merging.source import open_folders, open_run
from moa.training.optimizer import make_optimizer
from moa.training.stages import parameter_groups, set_trainable
from tests.support.families import tiny_family
from tests.support.tiny import tiny_batch
from tests.support.toy import read_log, toy_config
from tests.test_train import run_killed, run_once

TASKS = {"x": RankGates(kind="task", num_tasks=2), "y": RankGates(kind="task", num_tasks=2)}
TOKENS = {"y": RankGates(kind="token", keep=2)}
CORES = {"x": RankGates(kind="core"), "y": RankGates(kind="core")}
ONE_A = {name: Ties(share_a="one") for name in "xy"}
SAME = {name: Ties(share_a="one", share_b="one") for name in "xy"}


def layer_with(ranked: dict[str, RankGates], ties: dict[str, Ties] | None = None, held: bool = False):
    """A double layer 6 -> 5 with experts x, y, z of rank 3, everything random."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"site": nn.Linear(6, 5, dtype=torch.double).requires_grad_(False)})
    bank = ExpertBank.attach(holder, ["site"])
    for name in "xyz":
        bank.add(name, rank=3, alpha=6)
    bank.tie(ties or {})
    holder.double()
    for name, settings in ranked.items():
        bank.gate_ranks(name, settings)
    for parameter in [*bank.parameters(), *bank.rank_gates().values()]:
        nn.init.normal_(parameter)
    return bank, holder["site"]


def loop(site, x, gates, tasks, ranked):
    """Over samples, tokens, experts and ranks, each in a line."""
    out = site.base_layer(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for e, name in enumerate("xyz"):
                learned = site.learned_rank_gates(name)
                own, core = torch.ones(3, dtype=torch.double), torch.eye(3, dtype=torch.double)
                if name in ranked and ranked[name].kind == "core":
                    core = learned.double()
                elif name in ranked and ranked[name].kind == "task":
                    own = learned.double()[tasks[b]] if tasks[b] >= 0 else learned.double().mean(0)
                elif name in ranked:
                    scores = (learned @ x[b, t].float()).sigmoid()
                    kept = [r for r in range(3) if r != int(scores.argmin())]
                    own = torch.stack([3 * scores[r] / scores[kept].sum() * (r in kept) for r in range(3)]).double()
                for r in range(3):
                    a, c = core[r] @ site.lora_A[name], site.lora_B[name][:, r]
                    out[b, t] = out[b, t] + gates[b, 0, e] * 2.0 * own[r] * (a @ x[b, t]) * c
    return out


@pytest.mark.parametrize(
    ("ranked", "ties"),
    [
        *((ranked, ties) for ranked in (TASKS, TOKENS, {**TASKS, **TOKENS}) for ties in ({}, ONE_A)),
        (CORES, {}),
        (CORES, SAME),
        ({**TASKS, **CORES, "x": TASKS["x"]}, ONE_A),
    ],
)
def test_gated_ranks_and_their_gradients_equal_a_loop_over_ranks(ranked, ties):
    bank, site = layer_with(ranked, ties)
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)
    gates, tasks = torch.rand(3, 1, 3, dtype=torch.double, requires_grad=True), torch.tensor([1, 0, -1])
    bank.set_gates(gates)
    bank.set_tasks(task_shares(tasks, 2), {})
    leaves = [x, gates, *bank.parameters(), *bank.rank_gates().values()]
    ours, expected = site(x), loop(site, x, gates, tasks, ranked)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(site(x), expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_token_keeps_as_many_ranks_as_asked_for_with_mean_one():
    gates = token_rank_gates(torch.randn(2, 5, 6), torch.randn(8, 6), 3)
    assert ((gates > 0).sum(-1) == 3).all()
    torch.testing.assert_close(gates.mean(-1), torch.ones(2, 5))
    torch.testing.assert_close(token_rank_gates(torch.randn(4, 6), torch.zeros(8, 6), 8), torch.ones(4, 8))


def test_dropout_is_of_each_expert_by_itself_and_of_training_alone():
    bank, site = layer_with({"x": RankGates(dropout=0.5)}, ONE_A)
    x = torch.randn(2, 500, 6, dtype=torch.double)
    bank.set_gates(torch.ones(2, 1, 3, dtype=torch.double))
    plain = site.eval()(x)
    hidden = x @ site.lora_A["x"].T
    difference = site.train()(x) - plain  # y has the same A, and nothing of it is dropped
    back = difference.detach() @ torch.linalg.pinv(2 * site.lora_B["x"].detach()).T / hidden.detach()
    assert torch.allclose(back.abs(), torch.ones_like(back))  # doubled, or gone
    assert 0.45 < (back > 0).double().mean() < 0.55
    with torch.no_grad():
        torch.testing.assert_close(site(x), plain)


def test_ranks_with_gates_by_task_leave_the_backbone_alone_and_know_no_other_sample(tmp_path):
    ranked = {"rank": 4, "rank_gates": "task", "dropout": 0.2}
    config = toy_config(tmp_path, experts={"vqa": ranked, "grounding": {"rank": 4, "rank_gates": "token"}})
    model = build_model(config).eval()
    batch = tiny_batch(tiny_family("llava").processor, tasks=[0, 1, -1, 0], experts=[0, 1, 0, 1])
    with torch.no_grad():
        with model.bank.context.disabled():
            base = model(batch).logits
        assert torch.equal(model(batch).logits, base)
        for parameter in [*model.bank.parameters(), *model.bank.rank_gates().values()]:
            nn.init.normal_(parameter, std=0.3)
        whole, padded = (
            model(tiny_batch(tiny_family("llava").processor, tasks=[0, 1, -1, 0], experts=[0, 1, 0, 1], pad=pad))
            for pad in (0, 3)
        )
        torch.testing.assert_close(whole.loss_per_sample, padded.loss_per_sample)
        other = tiny_batch(tiny_family("llava").processor, tasks=[1, 1, -1, 0], experts=[0, 1, 0, 1])
        changed = model(other, whole.gates).loss_per_sample
        kept = model(batch, whole.gates).loss_per_sample
    assert changed[0] != kept[0]
    torch.testing.assert_close(changed[1:], kept[1:])


@pytest.mark.slow
def test_a_run_with_gated_ranks_resumes_exactly_and_is_not_merged(tmp_path, monkeypatch):
    experts = {"vqa": {"rank": 4, "rank_gates": "token", "active_ranks": 2, "dropout": 0.1},
               "grounding": {"rank": 4, "rank_gates": "task"}}  # fmt: skip
    stages = {"joint": {"steps": 4, "lr": {"experts": 0.01, "router": 0.05, "b_ratio": 4}}}
    changes = {"experts": experts, "stages": stages, "train__save_every": 1}
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(tmp_path, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    first = next(line for line in read_log(whole.out) if "loss" in line)
    assert first["lr/experts_b"] == 4 * first["lr/experts"]
    run_killed(broken, 2, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    learned = load_model(whole.out)[0].bank.rank_gates()
    assert len(learned) == 8 and all((p != 1).any() for key, p in learned.items() if key.startswith("task."))
    for opened in (
        lambda: open_run(whole.out),
        lambda: open_folders([f"{whole.out}/checkpoints/step-000004/experts/*"]),
    ):
        with pytest.raises(ValueError, match=r"experts\.\w+\.rank_gates=\w+: the gates of its ranks change"):
            opened()


def test_b_learns_at_its_own_rate_and_gates_of_a_frozen_expert_do_not(tmp_path):
    experts = {"vqa": {"rank": 4, "rank_gates": "task", "frozen": True}, "grounding": {"rank": 4, "rank_gates": "task"}}
    lr = {"experts": 0.01, "b_ratio": 16}
    stages = {"joint": {"steps": 1, "lr": lr}}
    config = toy_config(tmp_path, experts=experts, stages=stages)
    model, stage = build_model(config), config.stages["joint"]
    groups = set_trainable(model, parameter_groups(model, config), stage)
    assert not any("vqa" in key for key in groups["router"] if key.startswith("rank_gates"))
    rates = {
        g["name"]: (g["lr"], len(g["params"]))
        for g in make_optimizer(model, groups, stage.lr, config.train).param_groups
    }
    assert rates["experts"] == (0.01, 4) and rates["experts_b"] == (0.16, 4)


FROZEN = {"rank": 2, "rank_gates": "task", "frozen": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts__vqa__active_ranks": 2}, "experts.vqa.active_ranks: has no effect with rank_gates=none"),
        (
            {"experts__vqa__rank_gates": "task", "stages": {"experts": {"steps": 1}}},
            "experts.vqa.rank_gates: are learned",
        ),
        ({"experts__vqa__rank_gates": "task", "losses__crosstalk": 0.1}, "losses.crosstalk: measures whole updates"),
        ({"experts__vqa": FROZEN, "losses__crosstalk": 0.1}, "losses.crosstalk: measures whole updates"),
        ({"experts__vqa": FROZEN, "losses__difference": 0.1}, "losses.difference: is of outputs B A x"),
        ({"experts__vqa__frozen": True, "experts__vqa__dropout": 0.1}, "experts.vqa.dropout: has no use"),
    ],
)
def test_settings_of_ranks_that_cannot_work_are_refused_by_their_key(tmp_path, changes, message):
    with pytest.raises(ValueError) as caught:
        toy_config(tmp_path, **changes)
    assert message in str(caught.value)


def test_more_active_ranks_than_ranks_are_refused(tmp_path):
    config = toy_config(tmp_path, experts__vqa__rank_gates="token", experts__vqa__active_ranks=9)
    with pytest.raises(ValueError, match=r"experts\.vqa\.active_ranks: is 9, and .* has the rank 2"):
        build_model(config)
