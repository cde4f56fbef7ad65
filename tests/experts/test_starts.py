"""Starts of experts: the papers' formulas by hand, a function that is unchanged, and files that are whole updates."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from moa.build import build_model
from moa.checkpoint import load_model, step_folder
from moa.config import load_config
from moa.experts.bank import ExpertBank
from moa.experts.starts import STARTS, Starts
from moa.experts.ties import Ties
from moa.sections import ExpertConfig
from moa.training.stages import check_starts, parameter_groups
from tests.support.peft import read_expert
from tests.support.toy import toy_config
from tests.test_train import log_of, run_killed, run_once

HELD = [name for name, start in STARTS.items() if start.held]


def layer_with(init: str, count: int = 3, *, rank: int = 2, **options) -> tuple[ExpertBank, nn.Module]:
    """A layer 8 -> 7 with experts x, y, z that start so, of scaling 2."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"site": nn.Linear(8, 7).requires_grad_(False)})
    bank, names = ExpertBank.attach(holder, ["site"]), "xyz"[:count]
    starts = Starts(dict.fromkeys(names, init), dict.fromkeys(names, rank), seed=0)
    for name in names:
        bank.add(name, rank=rank, alpha=2 * rank, starts=starts, **options)
    return bank, holder["site"]


def test_the_config_has_every_start():
    assert get_args(get_type_hints(ExpertConfig)["init"]) == tuple(STARTS)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_start_leaves_the_function_and_the_weight_unchanged(init, use_rslora):
    bank, site = layer_with(init, use_rslora=use_rslora)
    weight = site.base_layer.weight.clone()
    x, gates = torch.randn(4, 5, 8), torch.rand(4, 1, 3) * 2
    bank.set_gates(gates)
    expected = site.base_layer(x)
    torch.testing.assert_close(site(x), expected, atol=1e-5, rtol=1e-5)  # fp32 rounding: the terms are summed in turn
    with torch.no_grad():
        bank.set_gates(gates)
        torch.testing.assert_close(site(x), expected, atol=1e-5, rtol=1e-5)
    assert site.base_layer.weight.equal(weight)
    a, b = site.whole("x")
    torch.testing.assert_close(b @ a, torch.zeros(7, 8), atol=1e-6, rtol=0)  # its file is no update yet
    assert bool(site.starts) == STARTS[init].held


@pytest.mark.parametrize("init", HELD)
def test_where_b_is_not_zero_a_learns_from_the_first_step_and_the_start_stays(init):
    bank, site = layer_with(init)
    bank.set_gates(torch.ones(1, 1, 3))
    before = [site.factor("start", f, "x").clone() for f in "AB"]
    optimizer = torch.optim.SGD([p for p in bank.parameters() if p.requires_grad], lr=0.1)
    site(torch.randn(2, 3, 8)).square().sum().backward()
    assert all(a.grad.abs().max() > 1e-3 for a in site.lora_A.values())
    optimizer.step()
    for factor, kept in zip("AB", before, strict=True):
        assert site.factor("start", factor, "x").equal(kept)
    a, b, a0, b0 = site.own("x")
    difference = b @ a + b0 @ a0  # b0 is minus the B of the start
    torch.testing.assert_close(torch.matmul(*reversed(site.whole("x"))), difference)
    assert difference.abs().max() > 1e-3


def test_svd_starts_are_pissa_milora_and_goat_by_hand():
    layer_with("lora")
    for init, places in {"svd_top": (0, 1), "svd_bottom": (5, 6), "svd_segments": (2, 3)}.items():
        bank, site = layer_with(init)  # 7 values in three segments of two
        u, s, v = torch.linalg.svd(site.base_layer.weight.double())
        part = sum(s[i] * torch.outer(u[:, i], v[i]) for i in places)
        part = part / 10 if init == "svd_segments" else part
        b, a = site.lora_B["y"].double(), site.lora_A["y"].double()
        torch.testing.assert_close(2 * b @ a, part, atol=1e-6, rtol=1e-5)  # scaling B A, of the second expert
        torch.testing.assert_close(b.T @ b, a @ a.T, atol=1e-6, rtol=1e-5)  # sqrt(S) in each
        assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(ValueError, match=r"experts.x.init=svd_segments: 7 singular values are too few for rank 3 \(3"):
        layer_with("svd_segments", rank=3)


def test_orthogonal_experts_read_different_subspaces_as_strongly_as_the_default():
    _, site = layer_with("orthogonal")
    a = torch.cat([*site.lora_A.values()])
    torch.testing.assert_close(3 * a @ a.T, torch.eye(6), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="init=orthogonal: 3 experts of rank 3 need 9 inputs"):
        layer_with("orthogonal", rank=3)


def test_heads_of_one_a_start_apart_with_random_b():
    bank, site = layer_with("random_b")
    bank.tie({name: Ties(share_a="one") for name in "xyz"})
    assert len({id(site.factor(kind, "A", e)) for kind in ("lora", "start") for e in "xyz"}) == 2
    bank.set_gates(torch.rand(4, 1, 3))
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(site(x), site.base_layer(x), atol=1e-5, rtol=1e-5)
    heads = torch.stack([*site.lora_B.values()])
    assert torch.pdist(heads.flatten(1)).min() > 0.1
    bank.remove("y")
    bank.set_gates(torch.rand(4, 1, 2))
    torch.testing.assert_close(site(x), site.base_layer(x), atol=1e-5, rtol=1e-5)


STARTED = {
    "experts": {
        "vqa": {"rank": 2, "alpha": 4, "init": "random_b", "share_a": "one"},
        "grounding": {"rank": 2, "alpha": 4, "init": "random_b", "share_a": "one", "use_rslora": True},
    }
}


@pytest.mark.slow
def test_a_run_with_held_starts_is_resumed_exactly_and_its_files_are_whole_updates(tmp_path, monkeypatch):
    stages = {"experts": {"steps": 2}, "joint": {"steps": 2}}
    config = toy_config(tmp_path, train__save_every=1, data__validation={}, stages=stages, **STARTED)
    unbroken = replace(config, out=str(tmp_path / "unbroken"))
    run = run_once(unbroken)
    run_killed(config, 3, monkeypatch)
    assert log_of(config) == log_of(unbroken)
    found = load_model(unbroken.out)[0].bank  # for evaluation: plain experts of twice the rank
    for name, bank in (("vqa", run.model.bank), ("grounding", run.model.bank)):
        tensors, settings = read_expert(step_folder(unbroken.out) / "experts" / name)
        assert settings["r"] == 4
        for site_name, site in bank.sites.items():
            a, b = (tensors[f"base_model.model.{site_name}.lora_{f}.weight"] for f in "AB")
            own_a, own_b, start_a, start_b = site.own(name)
            plain = found.sites[site_name]
            assert (plain.starts, plain.scalings[name]) == (set(), pytest.approx(site.scalings[name]))
            torch.testing.assert_close(b @ a, (own_b @ own_a + start_b @ start_a).detach())
            assert plain.lora_A[name].equal(a)
    # a stage that starts from the run, which is checked before, has the same start and factors
    stage = {"joint": {"steps": 1, "init_from": unbroken.out}}
    again = toy_config(tmp_path, seed=5, stages=stage, **STARTED)
    model = build_model(again, to_train=True)
    before = {key: p.clone() for key, p in parameter_groups(model, again)["experts"].items()}
    check_starts(model, again, 0)
    assert all(p.equal(before[key]) for key, p in parameter_groups(model, again)["experts"].items())
    assert not any("start" in key for key in before)


@pytest.mark.parametrize(
    ("experts", "model", "message"),
    [
        ({"x": {"init": "svd_top", "init_from": "somewhere"}}, {}, "experts.x.init: svd_top has no effect with"),
        ({"x": {"init": "svd_top", "tie_layers": ["q"]}}, {}, "experts.x.init: svd_top is of one layer's weight"),
        ({"x": {"init": "svd_top"}}, {"quantization": "4bit"}, "experts.x.init: svd_top reads weights as they are"),
        ({"x": {"init": "svd_top", "share_a": "1"}, "y": {"share_a": "1"}}, {}, "experts.x.init: must be the same"),
    ],
)
def test_settings_of_starts_without_effect_are_errors(experts, model, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [("experts", experts), ("model", model)])
