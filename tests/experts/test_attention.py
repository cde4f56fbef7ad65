"""Attention of tokens over the experts' answers: against a loop, its gradients, samples by themselves, restarts."""

import pytest
import torch
from torch import nn

from moa.build import build_model
from moa.checkpoint import load_model
from tests.experts.test_adapter import MLP
from tests.support.families import tiny_family
from tests.support.tiny import tiny_batch
from tests.support.toy import read_log, toy_config
from tests.test_model import rows
from tests.test_train import run_killed, run_once

LORA = {"vqa": {"rank": 2, "alpha": 4}, "grounding": {"rank": 3, "alpha": 3}}
ADAPTERS = {
    name: {**own, "kind": "serial_adapter", "activation": "relu", "targets": [MLP]} for name, own in LORA.items()
}
ROUTER = {"router__granularity": "token", "router__score": "attention", "router__hidden": 4}


def batch_of(**options):
    return tiny_batch(tiny_family("llava").processor, tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1], **options)


def attending(tmp_path, experts, **changes):
    model = build_model(toy_config(tmp_path, experts=experts, **ROUTER, **changes)).eval()
    with torch.no_grad():
        assert torch.equal(model(batch_of()).logits, model(batch_of(), torch.zeros(4, 1, 2)).logits)  # as the base
    torch.manual_seed(0)
    for parameter in [*model.bank.parameters(), *model.bank.site_routers().values()]:
        nn.init.normal_(parameter, std=0.2)
    return model


def loop(site, x, out, k):
    """Each token's attention, softmax over q . (K a_e), and the sum of what it attends to; the best `k` alone."""
    read = out if site.kind == "serial_adapter" else x
    answers, scores = [], []
    for expert in site.experts:
        hidden = read @ site.lora_A[expert].T
        hidden = hidden.relu() if site.kind == "serial_adapter" else hidden
        answers.append(site.scalings[expert] * hidden @ site.lora_B[expert].T)
        scores.append(((read @ site.token_query.T) * (answers[-1] @ site.token_key.T)).sum(-1))
    scores = torch.stack(scores, -1)
    gates = scores.masked_fill(scores < scores.topk(k, -1).values[..., -1:], float("-inf")).softmax(-1)
    return out + sum(gates[..., e, None] * answer for e, answer in enumerate(answers))


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "kind"), [(LORA, "softmax"), (LORA, "top_k"), (ADAPTERS, "softmax")])
def test_tokens_attend_to_answers_as_a_loop_does_and_samples_do_not_know_each_other(tmp_path, experts, kind):
    model = attending(tmp_path, experts, router__kind=kind, router__top_k=1)
    calls = {}
    for name, site in model.bank.sites.items():
        if site.experts:
            site.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    whole = model(batch_of())
    with torch.no_grad():
        for name, (x, out) in calls.items():
            site = model.bank.sites[name]
            expected = loop(site, x, site.base_layer(x), 1 if kind == "top_k" else 2)
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model(batch_of(pad=3)).loss_per_sample, whole.loss_per_sample)
        torch.testing.assert_close(model(rows(batch_of(), [2])).loss_per_sample, whole.loss_per_sample[2:3])
    (whole.loss_per_sample.sum() + sum(whole.aux.values())).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.bank.site_routers().values())
    prompt = batch_of(answers=None, left=True)
    cached, uncached = (model.generate(prompt, max_new_tokens=4, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.slow
def test_a_run_learns_to_attend_to_frozen_adapters_and_resumes_exactly(tmp_path, monkeypatch):
    stages = {"experts": {"steps": 2, "lr": {"experts": 0.05}}, "router": {"steps": 3, "lr": {"router": 0.05}}}
    changes = {"experts": ADAPTERS, "stages": stages, "train__save_every": 1, **ROUTER}
    whole = toy_config(tmp_path, out=str(tmp_path / "whole"), **changes)
    broken = toy_config(tmp_path, out=str(tmp_path / "broken"), **changes)
    run_once(whole)
    run_killed(broken, 3, monkeypatch)
    assert read_log(broken.out) == read_log(whole.out)
    first, learned = build_model(whole).bank.site_routers(), load_model(whole.out)[0].bank.site_routers()
    assert learned.keys() == first.keys() and all((learned[key] != first[key]).any() for key in first)
