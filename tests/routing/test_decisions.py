"""Losses on routing decisions and the gates that were used: whose ids, which tokens, which sites."""

import math

import pytest
import torch
import torch.nn.functional as F

from moa.routing.decisions import (
    TokenDecisions,
    mean_token_gates,
    token_decisions,
    token_losses,
)
from moa.routing.losses import gate_losses
from moa.routing.roles import Roles
from moa.routing.routing import Routing

OWNER = torch.tensor([0, 0, 1, 2, 2, 0])
MASK = torch.tensor([True, True, True, True, True, False])
EXPERTS, TASKS = torch.tensor([2, 0, 1]), torch.tensor([0, 0, 1])


def routing(top_k: int | None) -> Routing:
    """Of kind softmax, or top_k."""
    kind = "softmax" if top_k is None else "top_k"
    roles = Roles(("a", "b", "c"), ("routed",) * 3)
    return Routing(roles=roles, kind=kind, top_k=top_k or 1, granularity="token")


def decisions(num_sites: int, seed: int = 0) -> TokenDecisions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_sites, 6, 3, generator=generator)
    return TokenDecisions(logits=logits, owner=OWNER, mask=MASK)


def test_balance_within_a_task_goes_by_tasks_and_counts_the_places_of_top_k():
    """Four samples of two tasks, each task its own expert: balanced as a whole, collapsed within each task."""
    probs = torch.tensor([[[0.75, 0.25]] * 2 + [[0.25, 0.75]] * 2])
    tasks, experts = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    found = gate_losses(probs.log(), probs, experts, tasks, top_k=1)
    assert found["load_balancing"].item() == pytest.approx(1)  # 2 * (0.5 * 0.5 + 0.5 * 0.5)
    assert found["within_task_balancing"].item() == pytest.approx(1.5)  # 2 * 1 * 0.75
    soft = gate_losses(probs.log() + 2, probs, experts, tasks)
    assert soft["z"].item() == pytest.approx(4)  # log of the sum of e^2 * probs, squared
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert soft["entropy"].item() == pytest.approx(entropy)
    assert soft["within_task_balancing"].item() == pytest.approx(1.25)  # 2 * (0.75^2 + 0.25^2)
    uneven = gate_losses(probs[:, :3].log(), probs[:, :3], experts[:3], tasks[:3], top_k=1)
    mean = torch.tensor([1.75, 1.25]) / 3
    expected = 2 * (mean * torch.tensor([2 / 3, 1 / 3])).sum()
    torch.testing.assert_close(uneven["load_balancing"], expected)


def test_the_guidance_of_tokens_is_by_the_experts_of_their_samples():
    group = decisions(2)
    found = token_losses([group], EXPERTS, TASKS, routing(None).token_losses)["guidance"]
    valid, wanted = group.logits[:, MASK], EXPERTS[OWNER[MASK]]
    expected = F.cross_entropy(valid.flatten(0, 1), wanted.repeat(2))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("top_k", [None, 1])
def test_sites_count_alike_however_they_are_grouped(top_k):
    one, three = decisions(1), decisions(3, seed=1)
    whole = TokenDecisions(logits=torch.cat([one.logits, three.logits]), owner=OWNER, mask=MASK)
    apart = token_losses([one, three], EXPERTS, TASKS, routing(top_k).token_losses)
    together = token_losses([whole], EXPERTS, TASKS, routing(top_k).token_losses)
    assert apart.keys() == together.keys()
    for key, value in together.items():
        torch.testing.assert_close(apart[key], value)
    gates = (mean_token_gates(groups, 3, routing(top_k).token_gates) for groups in ([one, three], [whole]))
    torch.testing.assert_close(*gates)


def test_the_gates_of_a_sample_are_the_mean_over_its_tokens_and_sites():
    first = torch.tensor([[[3.0, 1, 0], [0, 2, 1], [0, 0, 9], [5, 0, 0]]])  # a site of four tokens
    second = torch.tensor([[[1.0, 0, 0]], [[0, 0, 1.0]]])  # two sites of one token
    groups = [
        TokenDecisions(logits=first, owner=torch.tensor([0, 0, 1, 0]),
                       mask=torch.tensor([True, True, True, False])),
        TokenDecisions(logits=second, owner=torch.tensor([0]), mask=torch.tensor([True])),
    ]  # fmt: skip
    found = mean_token_gates(groups, 3, routing(1).token_gates)
    # sample 0: experts 0 and 1 at the first site, 0 and 2 at the others; sample 2 has no token
    assert found.tolist() == [[[0.5, 0.25, 0.25]], [[0.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]
    every = mean_token_gates(groups, 3, routing(None).token_gates)
    torch.testing.assert_close(every[1, 0], torch.tensor([0.0, 0.0, 9.0]).softmax(-1))


def test_tokens_are_stacked_where_sites_have_the_same_ones_and_keep_their_owners():
    samples = torch.tensor([[0, 0, 1], [2, -1, -1]])
    pictures = torch.tensor([1, -1])
    logits = {
        "a": torch.arange(18.0).view(2, 3, 3), "b": torch.arange(18.0, 36).view(2, 3, 3),
        "seen": torch.arange(12.0).view(2, 2, 3), "head": torch.arange(6.0).view(2, 3),
    }  # fmt: skip
    streams = {"a": "text", "b": "text", "seen": "image", "head": "image"}
    text, seen, head = token_decisions(logits, streams, samples, {"image": pictures})
    assert text.logits.tolist() == torch.arange(36.0).view(2, 6, 3).tolist()
    assert text.owner[text.mask].tolist() == [0, 0, 1, 2]
    assert text.mask.tolist() == [True] * 4 + [False] * 2
    assert seen.logits.shape == (1, 4, 3) and seen.mask.tolist() == [True, True, False, False]
    assert seen.owner.tolist() == [1, 1, 0, 0]
    assert head.logits.shape == (1, 2, 3) and head.mask.tolist() == [True, False]
