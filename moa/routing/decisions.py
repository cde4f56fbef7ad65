"""Routing decisions -> the losses on them and the gates that were used, per sample or per token."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moa.packing import Owners, Tokens


@dataclass(frozen=True, kw_only=True)
class TokenDecisions:
    """What the token routers of sites with equally many tokens decided.

    `owner` is the sample that each token belongs to, `mask` is False at padding. `choices` are the places of the
    sites' experts among those that the router chooses among; None: all of them. `bias` is that of `top_k_gates`.
    """

    logits: Float[Tensor, "site token expert"]  # divided by the temperature
    owner: Int[Tensor, " token"]
    mask: Bool[Tensor, " token"]
    choices: tuple[int, ...] | None = None
    bias: Float[Tensor, "site 1 expert"] | None = None
    sites: tuple[str, ...] = ()


def token_decisions(
    logits: Mapping[str, Float[Tensor, "*_ expert"]],
    streams: Mapping[str, str],
    token_samples: Tokens,
    owners: Owners,
    choices: Mapping[str, tuple[int, ...] | None] | None = None,
    biases: Mapping[str, Float[Tensor, " _"]] | None = None,
) -> Iterator[TokenDecisions]:
    """Stack the sites' logits where their tokens and `choices` are the same ones.

    `token_samples` names the sample of each token of the text stream, -1 at padding; `owners` that
    of each row of the other streams, -1 for none. Rows may have one token each, and then no axis for it.
    """
    stacks: dict[tuple[str, torch.Size, tuple[int, ...] | None], dict[str, Tensor]] = {}
    for site, tensor in logits.items():
        tensor = tensor if tensor.dim() == 3 else tensor[:, None]
        stacks.setdefault((streams[site], tensor.shape, (choices or {}).get(site)), {})[site] = tensor
    for (stream, (_, length, _), own), stack in stacks.items():
        text = stream == "text"
        owner = token_samples.flatten() if text else owners[stream].repeat_interleave(length)
        stacked = torch.stack([*stack.values()]).flatten(1, 2)
        bias = torch.stack([biases[site] for site in stack])[:, None].to(stacked.device) if biases else None
        about: dict[str, Any] = {"choices": own, "bias": bias, "sites": tuple(stack)}
        yield TokenDecisions(logits=stacked, owner=owner.clamp(min=0), mask=owner >= 0, **about)


def token_losses(
    groups: list[TokenDecisions],
    expert_ids: Int[Tensor, " batch"],
    task_ids: Int[Tensor, " batch"],
    losses: Callable[..., dict[str, Tensor]],
) -> dict[str, Float[Tensor, ""]]:
    """The losses on gates over valid tokens, averaged over all sites that have some; `losses` is
    `Routing.token_losses`."""
    each = [
        (len(g.logits), losses(g.logits, expert_ids[g.owner], task_ids[g.owner], g.mask, g.choices)) for g in groups
    ]
    each = [(count, found) for count, found in each if found]
    num_sites = sum(count for count, _ in each)
    total: dict[str, Tensor] = {}
    for count, found in each:
        for key, value in found.items():
            share = value * (count / num_sites)
            total[key] = total[key] + share if key in total else share
    return total


@torch.no_grad()
def mean_token_gates(
    groups: list[TokenDecisions], num_samples: int, decide: Callable[..., Tensor]
) -> Float[Tensor, "batch 1 expert"]:
    """Each sample's gates, averaged over its valid tokens at all sites: for reading, not for use."""
    total = count = torch.zeros(())
    for group in groups:
        gates = decide(group.logits, group.choices, bias=group.bias)
        member = F.one_hot(group.owner, num_samples).float() * group.mask[:, None]
        total = total.to(gates.device) + torch.einsum("tb,ste->be", member, gates)
        count = count.to(gates.device) + member.sum(0) * gates.shape[0]
    return (total / count.clamp(min=1)[:, None])[:, None]


@torch.no_grad()
def token_loads(
    groups: list[TokenDecisions], choose: Callable[..., Float[Tensor, "site token expert"]]
) -> dict[str, Float[Tensor, " _"]]:
    """Site -> how many valid tokens chose each of its experts; `choose` is `Routing.token_choice`."""
    found = dict[str, Tensor]()
    for group in groups:
        chosen = choose(group.logits, group.choices, bias=group.bias) > 0
        found |= zip(group.sites, (chosen & group.mask[:, None]).sum(1).float(), strict=True)
    return found
