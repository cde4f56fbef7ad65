"""Arrow: token routers that are computed from the experts."""

import pytest
import torch

from moa.experts.token_routers import directions
from tests.support.banks import LANGUAGE, fill, make_bank
from tests.support.tiny import tiny_llava
from tests.test_model import batch_of, close, make_model, rows


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_directions_are_the_first_right_singular_vectors_of_the_updates():
    ranks = (1, 3, 8, 20)  # the last one is above the width
    factors_a = [random(rank, 12, seed=rank) for rank in ranks]
    factors_b = [random(16, rank, seed=100 + rank) for rank in ranks]
    for found, a, b in zip(directions(factors_a, factors_b), factors_a, factors_b, strict=True):
        expected = torch.linalg.svd(b @ a).Vh[0]
        torch.testing.assert_close(found * (found @ expected).sign(), expected, atol=1e-4, rtol=0)
    turned = random(3, 3, seed=7)  # (B R, R^-1 A) is the same update
    same = directions([torch.linalg.solve(turned, factors_a[1])], [factors_b[1] @ turned])[0]
    one = directions(factors_a[1:2], factors_b[1:2])[0]
    torch.testing.assert_close(same * (same @ one).sign(), one, atol=1e-4, rtol=0)
    assert directions([random(2, 5, seed=1)], [torch.zeros(4, 2)]).eq(0).all()


@pytest.mark.slow
@torch.no_grad()
def test_tokens_are_routed_by_a_loop_over_experts_and_the_routers_follow_the_experts():
    model = make_model("top_k", granularity="token", top_k=2, score="arrow")
    bank = model.bank
    for site in bank.sites.values():
        site.token_router = None
    bank.add_token_routers(share="input", arrow=True)
    assert not bank.token_routers() and bank.token_choices()
    calls = {}
    for name, site in bank.sites.items():
        site.register_forward_hook(lambda m, args, out, name=name: calls.update({name: (args[0], out)}))
    whole = model(batch_of(model))
    for name, (x, out) in calls.items():
        site = bank.sites[name]
        leader, decided_by = bank.sites[site.routed.leader], calls[site.routed.leader][0]
        logits = [(decided_by @ torch.linalg.svd(b @ a).Vh[0]).abs()
                  for a, b in zip(leader.lora_A.values(), leader.lora_B.values(), strict=True)]  # fmt: skip
        best = torch.stack(logits, -1).topk(2, dim=-1)
        weights = best.values.softmax(-1)
        expected = site.base_layer(x)
        for place, (expert, a) in enumerate(site.lora_A.items()):
            gate = (weights * (best.indices == place)).sum(-1, keepdim=True)
            expected = expected + gate * site.scalings[expert] * (x @ a.T @ site.lora_B[expert].T)
        close(out, expected)
    close(model(rows(batch_of(model), [2])).loss_per_sample, whole.loss_per_sample[2:3])
    before = whole.loss_per_sample
    fill(bank, std=0.5)
    assert not torch.allclose(model(batch_of(model)).loss_per_sample, before)


def test_experts_come_before_routers_that_are_computed_too():
    bank = make_bank(tiny_llava()[0], targets=(LANGUAGE,), vqa=2)
    bank.add_token_routers(arrow=True)
    with pytest.raises(ValueError, match="add experts before the token routers"):
        bank.add("more", rank=2, alpha=2)
