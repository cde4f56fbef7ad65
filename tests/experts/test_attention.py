"""Attention of tokens over the experts' answers: against a loop, its gradients, samples by themselves."""

import pytest
import torch
from torch import nn

from moa.build import build_model
from tests.experts.test_adapter import MLP
from tests.support.families import tiny_family
from tests.support.tiny import tiny_batch
from tests.support.toy import toy_config
from tests.test_model import rows

LORA = {"vqa": {"rank": 2, "alpha": 4}, "grounding": {"rank": 3, "alpha": 3}}
ADAPTERS = {
    name: {**own, "kind": "serial_adapter", "activation": "relu", "targets": [MLP]} for name, own in LORA.items()
}
ROUTER = {"router__granularity": "token", "router__score": "attention", "router__hidden": 4}


def batch_of(**options):
    return tiny_batch(tiny_family("llava").processor, tasks=[0, 1, 0, 1], experts=[0, 1, 0, 1], **options)


def filled(model, number):
    """Everything random, after a look that fresh experts leave the base alone."""
    with torch.no_grad():
        assert torch.equal(model(batch_of()).logits, model(batch_of(), torch.zeros(4, 1, number)).logits)
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
    changes = {"experts": experts, **ROUTER, "router__kind": kind, "router__top_k": 1}
    model = filled(build_model(toy_config(tmp_path, **changes)).eval(), 2)
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


BANKS = {
    **{name: {**own, "bank": ["image"]} for name, own in LORA.items()},
    **{f"{name}_asked": {**own, "bank": ["text"]} for name, own in LORA.items()},
}
TWO_BANKS = {"router__granularity": "both", "router__score": "attention", "router__evidence": ["image", "text"]}
TOP_1 = {"router__kind": "top_k", "router__top_k": 1, "router__straight_through": True}
UNGUIDED = {"losses__guidance": 0, "losses__guidance_end": 0, "losses__z": 0}


def weighed(site, x, chosen):
    """Of each bank the chosen expert's answer, and a softmax over banks of w . answer."""
    answers, scores = [], []
    for bank, experts in enumerate((site.experts[:2], site.experts[2:])):
        each = [site.scalings[e] * (x @ site.lora_A[e].T) @ site.lora_B[e].T for e in experts]
        answers.append(torch.stack([each[place][row] for row, place in enumerate(chosen[bank])]))
        scores.append(answers[-1] @ site.token_key[bank])
    shares = torch.stack(scores, -1).softmax(-1)
    return site.base_layer(x) + sum(shares[..., bank, None] * answer for bank, answer in enumerate(answers))


@pytest.mark.slow
def test_samples_choose_in_each_bank_by_its_evidence_and_tokens_weigh_the_banks_as_a_loop_does(tmp_path):
    config = toy_config(tmp_path, experts=BANKS, **TWO_BANKS, **TOP_1, **UNGUIDED)
    model = filled(build_model(config).eval(), 4)
    for router in model.router.routers:
        nn.init.normal_(router.head[-1].weight, std=3)
    calls, batch = {}, batch_of()
    for name, site in model.bank.sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    whole, evidence = model(batch), model.evidence(batch)
    with torch.no_grad():
        chosen = [router(evidence)[:, 0].argmax(-1).tolist() for router in model.router.routers]
        for name, (x, out) in calls.items():
            torch.testing.assert_close(out, weighed(model.bank.sites[name], x, chosen), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(whole.gates.sum(-1), torch.ones(4, 1))
        torch.testing.assert_close(model(batch_of(pad=3)).loss_per_sample, whole.loss_per_sample)
        torch.testing.assert_close(model(rows(batch_of(), [2])).loss_per_sample, whole.loss_per_sample[2:3])
        other = model(batch_of(images=[9, 8, 7, 6]))
        asked = [place for place, name in enumerate(model.bank.names) if name.endswith("_asked")]
        assert torch.equal(other.router_logits[..., asked], whole.router_logits[..., asked])
    (whole.loss_per_sample.sum() + sum(whole.aux.values())).backward()
    learned = [*model.bank.site_routers().values(), *(router.head[-1].weight for router in model.router.routers)]
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned)
    prompt = batch_of(answers=None, left=True)
    cached, uncached = (model.generate(prompt, max_new_tokens=4, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.slow
def test_banks_that_cannot_work_are_refused_by_their_key(tmp_path):
    plain = {"experts": BANKS, **TWO_BANKS, **UNGUIDED}
    toy_config(tmp_path, **plain)
    for changes, message in (
        ({"router__granularity": "token"}, "experts.vqa.bank: and router.granularity=both"),
        ({"experts__vqa__bank": None}, "experts.grounding.bank: is for all routed experts"),
        ({"router__evidence": ["image", "text", "ocr"]}, "router.evidence: must be what the banks read"),
        ({"router__kind": "top_k", "router__top_k": 3}, "router.top_k: is 3, and the smallest bank has 2"),
        ({"losses__guidance": 1}, "losses.guidance: must be 0 with banks"),
        ({"experts__vqa__targets": [r".*layers\.0\.mlp.*"]}, "experts.vqa.targets: must be the same"),
    ):
        with pytest.raises(ValueError) as caught:
            toy_config(tmp_path, **plain | changes)
        assert message in str(caught.value)
