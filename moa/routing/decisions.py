"""Routing decisions -> the losses on them and the gates that were used, per sample or per token."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moa.routing import losses
from moa.routing.gating import softmax_gates, top_k_gates


@dataclass(frozen=True, kw_only=True)
class TokenDecisions:
    """What the token routers of sites with equally many tokens decided.

    `owner` is the sample that each token belongs to, `mask` is False at padding.
    """

    logits: Float[Tensor, "site token expert"]  # divided by the temperature
    owner: Int[Tensor, " token"]
    mask: Bool[Tensor, " token"]


def router_losses(
    logits: Float[Tensor, "site token expert"],
    probs: Float[Tensor, "site token expert"],
    expert_ids: Int[Tensor, " token"],
    task_ids: Int[Tensor, " token"],
    *,
    top_k: int | None = None,
    mask: Bool[Tensor, " token"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Every auxiliary loss by its name in the config, unweighted."""
    return {
        "load_balancing": losses.load_balancing_loss(probs, top_k, mask),
        "within_task_balancing": losses.within_task_balancing_loss(probs, task_ids, top_k, mask),
        "z": losses.z_loss(logits, mask),
        "entropy": losses.entropy_loss(probs, mask),
        "guidance": losses.task_guidance_loss(logits, expert_ids, mask),
    }


def token_decisions(
    logits: Mapping[str, Float[Tensor, "*_ expert"]],
    streams: Mapping[str, str],
    token_samples: Int[Tensor, "rows seq"],
    owners: Mapping[str, Int[Tensor, " _"]],
) -> Iterator[TokenDecisions]:
    """Stack the sites' logits where their tokens are the same ones.

    `token_samples` names the sample of each token of the text stream, -1 at padding; `owners` that
    of each row of the other streams, -1 for nobody. Rows may have one token each, and then no axis for it.
    """
    stacks: dict[tuple[str, torch.Size], list[Tensor]] = {}
    for site, tensor in logits.items():
        tensor = tensor if tensor.dim() == 3 else tensor[:, None]
        stacks.setdefault((streams[site], tensor.shape), []).append(tensor)
    for (stream, (_, length, _)), stack in stacks.items():
        text = stream == "text"
        owner = token_samples.flatten() if text else owners[stream].repeat_interleave(length)
        yield TokenDecisions(
            logits=torch.stack(stack).flatten(1, 2), owner=owner.clamp(min=0), mask=owner >= 0
        )


def token_losses(
    groups: list[TokenDecisions],
    expert_ids: Int[Tensor, " batch"],
    task_ids: Int[Tensor, " batch"],
    top_k: int | None,
) -> dict[str, Float[Tensor, ""]]:
    """The losses of `router_losses` over valid tokens, averaged over all sites."""
    num_sites = sum(group.logits.shape[0] for group in groups)
    total: dict[str, Tensor] = {}
    for group in groups:
        found = router_losses(
            group.logits,
            softmax_gates(group.logits),
            expert_ids[group.owner],
            task_ids[group.owner],
            top_k=top_k,
            mask=group.mask,
        )
        for key, value in found.items():
            share = value * (group.logits.shape[0] / num_sites)
            total[key] = total[key] + share if key in total else share
    return total


@torch.no_grad()
def mean_token_gates(
    groups: list[TokenDecisions], num_samples: int, top_k: int | None
) -> Float[Tensor, "batch 1 expert"]:
    """Each sample's gates, averaged over its valid tokens at all sites: for reading, not for use."""
    total = count = torch.zeros(())
    for group in groups:
        gates = softmax_gates(group.logits)
        if top_k is not None:
            gates = top_k_gates(group.logits, min(top_k, gates.shape[-1]))
        member = F.one_hot(group.owner, num_samples).float() * group.mask[:, None]
        total = total.to(gates.device) + torch.einsum("tb,ste->be", member, gates)
        count = count.to(gates.device) + member.sum(0) * gates.shape[0]
    return (total / count.clamp(min=1)[:, None])[:, None]
