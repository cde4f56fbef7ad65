"""The speed benchmarks compare like with like: the contenders compute what ours does."""

import gc
import weakref

import pytest
import torch
from torch import nn

from bench.bench_model import make_batch, saved_bytes
from bench.contenders import LoopLinear, loop, ours, penalties, per_sample, ranks
from bench.settings import SIZES, Setting

SETTING = Setting(size=SIZES["tiny"], num_experts=3, rank=4, device="cpu", dtype=torch.float32)


def test_the_loop_over_experts_has_the_loss_of_ours():
    one, other = ours(SETTING), loop(SETTING)
    other.model.router.load_state_dict(one.model.router.state_dict())
    for name, site in one.model.bank.sites.items():
        layer = other.model.model.get_submodule(name)
        assert isinstance(layer, LoopLinear)
        layer.a = nn.ParameterList(site.lora_A.values())
        layer.b = nn.ParameterList(site.lora_B.values())
    one.model.eval()  # no dropout of evidence
    other.model.eval()
    torch.testing.assert_close(other.forward(), one.forward())


def test_adapters_of_samples_have_the_loss_of_ours_with_one_gate_each():
    one, other = ours(SETTING), per_sample(SETTING)
    for name, site in one.model.bank.sites.items():
        layer = other.model.model.get_submodule(name)
        for i, expert in enumerate(one.model.bank.names):
            layer.lora_A[str(i)].weight.data = site.lora_A[expert].data
            layer.lora_B[str(i)].weight.data = site.lora_B[expert].data
    scaling = layer.scaling["0"]
    gates = scaling * torch.eye(3)[torch.arange(SETTING.size.batch) % 3]
    batch = make_batch(SETTING.size, "cpu")
    expected = one.model(batch, gates).loss_per_sample.mean()
    torch.testing.assert_close(other.forward(), expected)


def test_gated_ranks_and_losses_on_experts_are_contenders_that_learn():
    for make in (ranks, penalties):
        contender = make(SETTING)
        contender.forward().backward()
        assert all(p.grad is not None for p in contender.model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_counting_saved_bytes_leaves_nothing_behind():
    x, seen = torch.randn(8, 16, requires_grad=True), []

    def run() -> torch.Tensor:
        hidden = (x * 2).exp()  # exp keeps its own output
        seen.append(weakref.ref(hidden))
        return hidden.sum()

    assert saved_bytes(run, ()) == 8 * 16 * 4
    gc.collect()
    assert seen[0]() is None
