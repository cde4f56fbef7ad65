"""Logits -> gates: what weight each expert gets, as pure functions of tensors in float32.

Gates are `[..., expert]`. Top-k, a missing expert and an oracle are all a gate tensor with zeros in it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def softmax_gates(logits: Float[Tensor, "*lead expert"]) -> Float[Tensor, "*lead expert"]:
    """Every expert, weights summing to one."""
    return torch.softmax(logits.float(), dim=-1)


def sigmoid_gates(logits: Float[Tensor, "*lead expert"]) -> Float[Tensor, "*lead expert"]:
    """Every expert for itself, each weight in (0, 1), of any sum."""
    return torch.sigmoid(logits.float())


def top_k_gates(
    logits: Float[Tensor, "*lead expert"],
    k: int,
    mask: Bool[Tensor, "*lead expert"] | None = None,
    joint: Bool[Tensor, " expert"] | None = None,
) -> Float[Tensor, "*lead expert"]:
    """The k best experts, softmax weights renormalised over them, exact zeros elsewhere.

    `mask` is False where an expert may not be used: it never takes one of the k places. With fewer
    than k experts left, those; with none, zeros. `joint` experts take no place and are kept beside
    the k. Raises ValueError unless 1 <= k <= experts.
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"top_k must be in 1..{num_experts} (the number of experts), got {k}")
    logits = logits.float()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    rivals = logits if joint is None else logits.masked_fill(joint, float("-inf"))
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept = kept.scatter(-1, rivals.topk(k, dim=-1).indices, True) & rivals.isfinite()
    if joint is not None:
        kept = kept | (joint & logits.isfinite())
    # A softmax over the kept ones, and not a division of probabilities, which may all be tiny; the
    # floor is finite, because a row that keeps none must not turn into NaN.
    return torch.softmax(logits.masked_fill(~kept, -1e30), dim=-1).masked_fill(~kept, 0.0)


def one_hot_gates(
    expert_ids: Int[Tensor, " batch"], num_experts: int, joint: Bool[Tensor, " expert"] | None = None
) -> Float[Tensor, "batch expert"]:
    """The oracle's gates: one expert each; id -1 (unknown) gets the uniform mixture, and
    id `num_experts` (the null expert) zeros. `joint` experts share each sample's sum alike with its own."""
    known = expert_ids >= 0
    gates = F.one_hot(expert_ids.clamp(min=0), num_experts + 1)[:, :num_experts].float()
    if joint is not None:
        gates = gates.masked_fill(joint, 1.0)
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known[:, None], gates, torch.full_like(gates, 1.0 / max(num_experts, 1)))


def apply_availability(
    gates: Float[Tensor, "*lead expert"], available: Bool[Tensor, "*#lead expert"]
) -> Float[Tensor, "*lead expert"]:
    """Exact zeros where an expert is not available; the others keep the row's sum.

    A row whose available experts all had weight zero shares its sum equally among them.
    """
    masked = gates * available
    total = gates.sum(-1, keepdim=True)
    kept = masked.sum(-1, keepdim=True)
    count = available.sum(-1, keepdim=True).clamp(min=1)
    shared = available.to(gates.dtype) / count
    tiny = torch.finfo(gates.dtype).tiny
    return torch.where(kept > tiny, masked / kept.clamp(min=tiny), shared) * total


def anchor_sums(
    sums: Float[Tensor, "expert feature"],
    counts: Float[Tensor, " expert"],
    features: Float[Tensor, "batch feature"],
    present: Bool[Tensor, " batch"],
    expert_ids: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "expert feature"], Float[Tensor, " expert"]]:
    """Add a batch of evidence to the running sum and count of each sample's expert.

    Sums and counts can be added up over processes. Rows without the evidence or a known expert (id -1) are left out.
    """
    used = (present & (expert_ids >= 0)).to(sums.dtype)
    one_hot = F.one_hot(expert_ids.clamp(min=0), sums.shape[0]).to(sums.dtype) * used[:, None]
    return sums + one_hot.T @ features.to(sums.dtype), counts + one_hot.sum(0)


def anchor_similarity(
    sums: Float[Tensor, "expert feature"],
    counts: Float[Tensor, " expert"],
    features: Float[Tensor, "batch feature"],
    present: Bool[Tensor, " batch"],
) -> Float[Tensor, "batch expert"]:
    """Cosine of each sample's evidence with each expert's mean evidence, 0 where either is missing.

    Both are relative to the mean over all experts: raw evidence of one encoder points nearly one way. Unlike in
    HiDe-LLaVA a sample is compared for itself, so that its gates do not depend on its batch.
    """
    seen = counts > 0
    anchors = sums / counts.clamp(min=1)[:, None]
    centre = (sums.sum(0) / counts.sum().clamp(min=1))[None]
    anchors, features = (anchors - centre) * seen[:, None], features.to(sums.dtype) - centre
    cosine = F.normalize(features, dim=-1) @ F.normalize(anchors, dim=-1).T
    return cosine * (present[:, None] & seen[None])
