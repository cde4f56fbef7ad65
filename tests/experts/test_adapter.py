"""Bottleneck adapters: the same numbers as a loop, the backbone untouched, files of their own, and no merge."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moa.build import build_model
from moa.checkpoint import load_model, step_folder
from moa.experts.bank import ExpertBank
from moa.experts.rank_gates import RankGates
from moa.experts.ties import Ties
from moa.merging.source import open_folders, open_run
from tests.support.families import tiny_family
from tests.support.tiny import tiny_batch
from tests.support.toy import read_log, toy_config
from tests.test_train import run_killed, run_once

MLP, PROJECTOR = r"model\.language_model\.layers\.\d+\.mlp", "model.multi_modal_projector"
PARALLEL = {"kind": "adapter", "rank": 3, "alpha": 6, "targets": [MLP, PROJECTOR]}
ATTENTION = [r"model\.language_model\.layers\.\d+\.self_attn", r"model\.vision_tower\.encoder\.layers\.[01]\.self_attn"]
PROMPT = {"kind": "prompt", "rank": 3, "alpha": 6, "targets": ATTENTION}
SERIAL = {**PARALLEL, "kind": "serial_adapter", "activation": "relu"}


def mlp_with(kind: str, activation: str, ties: dict[str, Ties]) -> tuple[ExpertBank, nn.Module]:
    """An MLP 6 -> 9 -> 5 in double, with adapters x and y and a LoRA z in its second layer, everything random."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))})
    holder.double().requires_grad_(False)
    bank = ExpertBank.attach(holder, [r"mlp\.2"], around={"mlp": (kind, activation)})
    for name in "xy":
        bank.add(name, kind=kind, rank=3, alpha=6)
    bank.add("z", rank=3, alpha=6)
    bank.tie(ties)
    holder.double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank, holder


def loop(bank, holder, x, gates, kind, activation):
    adapters, layer = bank.sites["mlp"], bank.sites["mlp.2"]
    hidden = torch.tanh(adapters.base_layer[0](x))
    lora = (hidden @ layer.lora_A["z"].T) @ layer.lora_B["z"].T
    inside = layer.base_layer(hidden) + gates[..., 2:] * 2 * lora
    read, out = (inside if kind == "serial_adapter" else x), inside
    for number, name in enumerate("xy"):
        scores = read @ adapters.lora_A[name].T
        bottleneck = scores.softmax(-1) if activation == "softmax" else getattr(F, activation)(scores)
        out = out + gates[..., number : number + 1] * 2 * (bottleneck @ adapters.lora_B[name].T)
    return out


@pytest.mark.parametrize("ties", [{}, {"x": Ties(share_a="one"), "y": Ties(share_a="one")}], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("kind", "activation"), [("adapter", "gelu"), ("serial_adapter", "relu"), ("prompt", "softmax")]
)
def test_adapters_and_their_gradients_equal_a_plain_loop(kind, activation, ties):
    bank, holder = mlp_with(kind, activation, ties)
    x = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True)
    gates = torch.rand(2, 1, 3, dtype=torch.double, requires_grad=True)
    bank.set_gates(gates)
    ours, expected = holder["mlp"](x), loop(bank, holder, x, gates, kind, activation)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(holder["mlp"](x), expected)
    leaves, weights = [x, gates, *bank.parameters()], torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, expected))
    torch.testing.assert_close(found, wanted)


def test_an_adapter_of_another_width_or_around_no_layer_is_refused():
    holder = nn.ModuleDict({"mlp": nn.Sequential(nn.Flatten(-2), nn.Linear(6, 5))})
    bank = ExpertBank.attach(holder, [], around={"mlp": ("adapter", "gelu")})
    bank.add("x", kind="adapter", rank=2, alpha=2)
    bank.set_gates(torch.ones(4, 1, 1))
    with pytest.raises(ValueError, match=r"mlp: maps \[4, 2, 3\] to \[4, 5\]"):
        holder["mlp"](torch.randn(4, 2, 3))
    with pytest.raises(ValueError, match="act: has no linear layer"):
        ExpertBank.attach(nn.ModuleDict({"act": nn.Tanh()}), [], around={"act": ("adapter", "gelu")})


def batch_of(**options):
    return tiny_batch(tiny_family("llava").processor, **options)


@pytest.mark.parametrize("expert", [PARALLEL, SERIAL, PROMPT], ids=["parallel", "serial", "prompt"])
def test_fresh_adapters_leave_the_backbone_alone_and_samples_do_not_know_each_other(tmp_path, expert):
    config = toy_config(tmp_path, experts={"vqa": expert, "grounding": {"rank": 2}})
    model = build_model(config).eval()
    plain = {name: module for name, module in model.model.named_modules() if name.endswith("mlp")}
    batch = batch_of(tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1])
    with torch.no_grad():
        with model.bank.context.disabled():
            base = model(batch).logits
        assert torch.equal(model(batch).logits, base)
        for parameter in model.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
        whole = model(batch)
        assert not torch.equal(whole.logits, base)
        padded = model(batch_of(tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1], pad=3))
        torch.testing.assert_close(padded.loss_per_sample, whole.loss_per_sample)
        prompt = batch_of(answers=None, left=True, tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1])
        cached, uncached = (model.generate(prompt, max_new_tokens=4, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)
    model.bank.detach(model.model)
    assert all("base_layer" not in name for name, _ in model.model.named_modules())
    assert len(plain) > 2


@pytest.mark.slow
def test_a_run_of_adapters_and_a_lora_resumes_exactly_and_is_not_merged(tmp_path, monkeypatch):
    experts = {"vqa": {**PARALLEL, "dropout": 0.1}, "grounding": PARALLEL, "common": {"rank": 2, "gate": "always"}}
    stages = {"experts": {"steps": 1}, "joint": {"copy_of": "vqa", "steps": 3}}
    changes = {"experts": experts, "stages": stages, "train__save_every": 1, "train__gradient_checkpointing": True}
    experts["grounding"] = experts["vqa"]
    experts["look"] = {**PROMPT, "gate": "with:vqa"}
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(tmp_path, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    run_killed(broken, 3, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    model = load_model(whole.out)[0]
    assert all(t.any() for name in ("grounding", "look") for t in model.bank.state(name).values())
    with pytest.raises(ValueError, match=r"experts\.vqa\.kind=adapter: it has an activation between its projections"):
        open_run(whole.out)
    folder = step_folder(whole.out) / "experts"
    with pytest.raises(ValueError, match=r"experts\.vqa\.kind=adapter"):
        open_folders([str(folder / "vqa")])
    moved = folder.rename(tmp_path / "alone")
    with pytest.raises(ValueError, match="peft_type must be LORA, got 'ADAPTER': it has an activation"):
        open_folders([str(moved / "vqa")])
    other = toy_config(tmp_path, experts__vqa={**SERIAL, "init_from": str(moved / "vqa")})
    with pytest.raises(ValueError, match=r"has the activation 'gelu' at .*, and the run has 'relu'"):
        build_model(other)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"kind": "adapter", "rank": 2}, "experts.vqa.targets: names no module, which kind=adapter is around"),
        ({"rank": 2, "activation": "relu"}, "experts.vqa.activation: has no effect with kind=lora"),
        ({**PROMPT, "activation": "relu"}, "experts.vqa.activation: has no effect with kind=prompt"),
        ({**PROMPT, "init": "random_b"}, "experts.vqa.init: random_b subtracts its start"),
        ({**PARALLEL, "init": "svd_top"}, "experts.vqa.init: svd_top is of a layer's weight"),
    ],
)
def test_settings_of_adapters_that_cannot_work_are_refused_by_their_key(tmp_path, expert, message):
    with pytest.raises(ValueError) as caught:
        toy_config(tmp_path, experts__vqa=expert)
    assert message in str(caught.value)


def test_two_kinds_around_one_module_and_crosstalk_of_adapters_are_refused(tmp_path):
    config = toy_config(tmp_path, experts={"vqa": PARALLEL, "grounding": SERIAL})
    with pytest.raises(ValueError, match=r"experts.grounding: is serial_adapter relu, and experts.vqa is adapter gelu"):
        build_model(config)
    with pytest.raises(ValueError, match="losses.crosstalk: reads updates B A, and these experts are none: vqa"):
        toy_config(tmp_path, experts__vqa=PARALLEL, losses__crosstalk=0.1)


def test_a_token_router_at_an_adapter_has_a_learned_noise_of_the_width_that_it_reads():
    bank, _ = mlp_with("adapter", "relu", {})
    bank.add_token_routers(noisy=True)
    assert {name: tuple(site.token_noise.shape) for name, site in bank.sites.items()} == {
        "mlp": (2, 6),
        "mlp.2": (1, 9),
    }


def test_ranks_of_adapters_have_gates_too():
    bank, holder = mlp_with("adapter", "relu", {})
    bank.gate_ranks("x", RankGates(kind="token", keep=3))
    nn.init.zeros_(bank.rank_gates()["token.x.mlp"])
    x, gates = torch.randn(2, 4, 6, dtype=torch.double), torch.rand(2, 1, 3, dtype=torch.double)
    bank.set_gates(gates)
    torch.testing.assert_close(holder["mlp"](x), loop(bank, holder, x, gates, "adapter", "relu"))  # all kept alike
