"""Auxiliary losses on routing decisions. A new one is a function, a weight and a row, all in this file.

Losses on the experts themselves have their weights here, and their functions where the layers call them: `crosstalk` in
moa/experts/crosstalk.py, those of `OF_EXPERTS` in moa/experts/penalties.py.

Decisions are `[site, token, expert]`, where a "token" is whatever is routed. Each loss is a mean over the valid tokens
(`mask`) of a site and then over sites, whatever the depth, padding or batch size.
"""

import math
from dataclasses import dataclass, fields

from jaxtyping import Bool, Float, Int

from moa.cli.ranges import NotNegative
from moa.routing.late import F, Tensor, torch


@dataclass(frozen=True, kw_only=True)
class GateLosses:
    """The weight of each loss on gates; `NAME_end` is its weight at the last step of a stage, linear between."""

    load_balancing: NotNegative = 0.0  # equal use of the experts over the batch
    within_task_balancing: NotNegative = 0.0  # equal use of the experts within each task
    importance: NotNegative = 0.0  # squared coefficient of variation of the experts' total shares
    load: NotNegative = 0.0  # the same of how often top-k with gaussian noise keeps each
    localized_balancing: NotNegative = 0.0  # of shares by the samples' expert, where the own one may have more
    z: NotNegative = 0.0  # keeps router logits small
    divergence: NotNegative = 0.0  # small where decisions are sure, and different ones for different tokens (HMoRA)
    entropy: float = 0.0  # above 0: sharper gates; below 0: softer gates
    # cross-entropy of the router with the sample's expert, at the first step
    guidance: NotNegative = 1.0
    guidance_end: NotNegative = 0.1  # its weight at the last step of the stage; linear between
    # how strongly experts answer to each other's samples, in stages that train experts; docs/merging_learned.md
    crosstalk: NotNegative = 0.0
    crosstalk_end: NotNegative | None = None  # its weight at the last step of the stage; null: the same
    orthogonality: NotNegative = 0.0  # of the routed experts' lora_A: each reads other directions (O-LoRA)
    difference: NotNegative = 0.0  # of the routed experts' outputs over a batch, between 0 and 1 (Pilot)
    alignment: NotNegative = 0.0  # of what lora_A gives for the tasks: one mean and variance (Align-LoRA)


Decisions = Float[Tensor, "site token expert"]  # logits, or probabilities before top-k
Ids = Int[Tensor, " token"]
Mask = Bool[Tensor, " token"] | None  # False at tokens that do not count
Loss = Float[Tensor, ""]
OF_EXPERTS = ("orthogonality", "difference", "alignment")
AUX = tuple(f.name for f in fields(GateLosses) if not f.name.endswith("_end"))


def gate_losses(
    logits: Decisions, probs: Decisions, expert_ids: Ids, task_ids: Ids, *,
    top_k: int | None = None, mask: Mask = None, spread: float | None = None,
) -> dict[str, Loss]:  # fmt: skip
    """Every loss by the name of its weight, unweighted; `load` where top-k has noise of the size `spread`."""
    load = {} if top_k is None or spread is None else {"load": load_loss(logits, top_k, spread, mask)}
    return load | {
        "load_balancing": load_balancing_loss(probs, top_k, mask),
        "within_task_balancing": within_task_balancing_loss(probs, task_ids, top_k, mask),
        "importance": importance_loss(probs, mask),
        "localized_balancing": localized_balancing_loss(probs, expert_ids, mask),
        "z": z_loss(logits, mask),
        "divergence": divergence_loss(probs, mask),
        "entropy": entropy_loss(probs, mask),
        "guidance": task_guidance_loss(logits, expert_ids, mask),
    }


def weights_at(losses: GateLosses, progress: float) -> dict[str, float]:
    """The weight of each loss where `progress`, from 0 to 1, of a stage is done."""
    start = {name: getattr(losses, name) for name in AUX}
    ends = {name: getattr(losses, f"{name}_end", None) for name in AUX}
    ends = {name: start[name] if end is None else end for name, end in ends.items()}
    return {name: start[name] + (ends[name] - start[name]) * progress for name in AUX}


def load_balancing_loss(probs: Decisions, top_k: int | None = None, mask: Mask = None) -> Loss:
    """E * sum_e f_e P_e, which is 1 at uniform use for every k, and at most E / k.

    P_e is the mean probability of expert e before top-k, f_e its share of the k * T places (Switch
    Transformer, arXiv 2101.03961, eq. 4, divided by k). Without `top_k` every expert has a place at
    its probability, so f = P; the gradient then flows through both.
    """
    weights = _weights(probs, mask)
    return _balance(probs, _places(probs, top_k), weights[None]).mean()


def within_task_balancing_loss(probs: Decisions, task_ids: Ids, top_k: int | None = None, mask: Mask = None) -> Loss:
    """The load-balancing loss inside each task, weighted by the tasks' shares of valid tokens.

    A router that gives each task its own expert is punished by the global form only where tasks are unequally frequent,
    and here always. Tokens of an unknown task (-1) are a task of their own.
    """
    weights = _weights(probs, mask)
    member = (task_ids[None] == task_ids.unique()[:, None]).to(probs.dtype)  # [task, token]
    in_task = member * weights
    loss = _balance(probs, _places(probs, top_k), in_task)  # [site, task]
    return (loss * in_task.sum(1) / weights.sum().clamp(min=1)).sum(1).mean()


def importance_loss(probs: Decisions, mask: Mask = None) -> Loss:
    """Squared coefficient of variation of the experts' summed probabilities (arXiv 1701.06538, eq. 6-7): 0 at uniform
    use, experts - 1 where one has all."""
    return _variation(torch.einsum("t,ste->se", _weights(probs, mask), probs)).mean()


def load_loss(logits: Decisions, top_k: int, spread: float, mask: Mask = None) -> Loss:
    """The same of the experts' loads: the sum over tokens of the probability that top-k keeps an expert if its noise of
    deviation `spread` is drawn anew and the others' logits stay (eq. 8-11), here those without noise."""
    if top_k >= logits.shape[-1]:
        return logits.sum() * 0  # all are kept
    best = logits.topk(top_k + 1, dim=-1).values
    inside = logits >= best[..., -2:-1]
    other = torch.where(inside, best[..., -1:], best[..., -2:-1])  # the k-th best of the others
    chance = torch.special.ndtr((logits - other) / spread)
    return _variation(torch.einsum("t,ste->se", _weights(logits, mask), chance)).mean()


LOCALITY = 0.1


def localized_balancing_loss(probs: Decisions, expert_ids: Ids, mask: Mask = None) -> Loss:
    """Squared coefficient of variation of the mean shares [group, expert], grouped by the expert that samples belong
    to, with the group's own one times 1 - d and others times 1 + d: the smallest where the own one's share is to
    theirs as 1 + d to 1 - d, d = LOCALITY (LoRAMoE, arXiv 2312.09979, section 3.3). Unknown experts (-1) are a group
    without an own one."""
    weights, groups = _weights(probs, mask), expert_ids.unique()
    member = (expert_ids[None] == groups[:, None]).to(probs.dtype) * weights  # [group, token]
    count = member.sum(1)[:, None]
    shares = torch.einsum("gt,ste->sge", member, probs) / count.clamp(min=1)
    own = (groups[:, None] == torch.arange(probs.shape[-1], device=groups.device)).to(probs.dtype)
    known = (groups >= 0)[:, None].to(probs.dtype)
    factors = 1 + LOCALITY * (1 - 2 * own) * known  # [group, expert]
    there = (count > 0).to(probs.dtype).expand_as(factors)
    return _variation((shares * factors).flatten(1), there.flatten()).mean()


def z_loss(logits: Decisions, mask: Mask = None) -> Loss:
    """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, eq. 5): keeps them small."""
    return _mean(logits.logsumexp(-1).square(), _weights(logits, mask))


def entropy_loss(probs: Decisions, mask: Mask = None) -> Loss:
    """Mean entropy of the decisions in nats; a positive weight sharpens them, a negative softens."""
    return _mean(torch.special.entr(probs).sum(-1), _weights(probs, mask))


SURE, EVEN = 0.5, 0.98


def divergence_loss(probs: Decisions, mask: Mask = None) -> Loss:
    """How far the decisions are from a generalised Jensen-Shannon divergence that is large enough, in units of ln E:

        relu(b - c - min(H(mean p), b) + mean max(H(p), c)),  H over ln E, b = EVEN, c = SURE

    0 where the mean is nearly even and each decision has an entropy of at most c (HMoRA, ICLR 2025, section 3.3).
    """
    weights, unit = _weights(probs, mask), math.log(max(probs.shape[-1], 2))
    mean = torch.einsum("t,ste->se", weights, probs) / weights.sum().clamp(min=1)
    mean = mean.clamp(min=torch.finfo(mean.dtype).tiny)  # without tokens it is 0, where the entropy has no gradient
    whole = (torch.special.entr(mean).sum(-1) / unit).clamp(max=EVEN)
    each = (torch.special.entr(probs).sum(-1) / unit).clamp(min=SURE)
    own = (each * weights).sum(1) / weights.sum().clamp(min=1)
    return torch.relu(EVEN - SURE - whole + own).mean() * (weights.sum() > 0)


def task_guidance_loss(logits: Decisions, expert_ids: Ids, mask: Mask = None) -> Loss:
    """Cross-entropy of the decisions with the expert each token belongs to; id -1 is left out. Zero, and still
    connected to the logits, where no expert is known."""
    weights = _weights(logits, mask) * (expert_ids >= 0)
    targets = expert_ids.clamp(min=0).expand(logits.shape[:2])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return _mean(loss.view(logits.shape[:2]), weights)


def _variation(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """[site, value] -> variance over mean squared of the values, by their weights; 0 where all are 0."""
    weights = values.new_ones(values.shape[-1]) if weights is None else weights
    total = weights.sum().clamp(min=1)
    mean = (values * weights).sum(-1, keepdim=True) / total
    variance = ((values - mean).square() * weights).sum(-1) / total
    return variance / mean[:, 0].square().clamp(min=1e-12)


def _weights(decisions: Tensor, mask: Tensor | None) -> Tensor:
    return decisions.new_ones(decisions.shape[1]) if mask is None else mask.to(decisions.dtype)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """[site, token] -> mean over valid tokens, then over sites; 0 where there is none."""
    return ((values * weights).sum(1) / weights.sum().clamp(min=1)).mean()


def _places(probs: Tensor, top_k: int | None) -> Tensor:
    if top_k is None:
        return probs
    chosen = probs.detach().topk(top_k, dim=-1).indices
    return probs.new_zeros(probs.shape).scatter(-1, chosen, 1.0 / top_k)


def _balance(probs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """[site, token, expert] x2, group weights [group, token] -> [site, group]."""
    total = weights.sum(1).clamp(min=1)[:, None]
    share = torch.einsum("gt,ste->sge", weights, places) / total
    mean = torch.einsum("gt,ste->sge", weights, probs) / total
    return probs.shape[-1] * (share * mean).sum(-1)
