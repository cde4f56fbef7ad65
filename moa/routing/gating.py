"""Logits -> gates: what weight each expert gets, as pure functions of tensors in float32.

Gates are `[..., expert]`. Top-k, a missing expert and an oracle are all a gate tensor with zeros in it.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Logits = Float[Tensor, "*lead expert"]
Gates = Float[Tensor, "*lead expert"]
Mask = Bool[Tensor, "*lead expert"] | None
Joint = Bool[Tensor, " expert"] | None
Sums = Float[Tensor, "expert feature"]
Counts = Float[Tensor, " expert"]


def softmax_gates(logits: Logits) -> Gates:
    return torch.softmax(logits.float(), dim=-1)


def sigmoid_gates(logits: Logits) -> Gates:
    """Every expert for itself, each weight in (0, 1), of any sum."""
    return torch.sigmoid(logits.float())


def top_k_gates(
    logits: Logits, k: int, mask: Mask = None, joint: Joint = None, renormalize: bool = True,
    bias: Float[Tensor, "*#lead expert"] | None = None,
) -> Gates:  # fmt: skip
    """The k best experts, softmax weights renormalised over them, exact zeros elsewhere.

    `mask` is False where an expert may not be used: it never takes one of the k places. With fewer
    than k experts left, those; with none, zeros. `joint` experts take no place and are kept beside
    the k. Without `renormalize` the weights are those of the softmax over all experts (Switch Transformer,
    arXiv 2101.03961, eq. 2). `bias` is added to the shares for the choice alone (arXiv 2408.15664, eq. 3).
    Raises ValueError unless 1 <= k <= experts.
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"top_k must be in 1..{num_experts} (the number of experts), got {k}")
    logits = logits.float()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    rivals = logits if bias is None else softmax_over(logits, logits.isfinite()) + bias
    rivals = rivals if bias is None or mask is None else rivals.masked_fill(~mask, float("-inf"))
    rivals = rivals if joint is None else rivals.masked_fill(joint, float("-inf"))
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept = kept.scatter(-1, rivals.topk(k, dim=-1).indices, True) & rivals.isfinite()
    if joint is not None:
        kept = kept | (joint & logits.isfinite())
    return softmax_over(logits, kept) if renormalize else softmax_over(logits, logits.isfinite()) * kept


def balanced_bias(bias: Counts, load: Counts, rate: float, joint: Joint) -> Counts:
    """A bias of `top_k_gates` after a step in which the experts were chosen `load` times: up by `rate` where that is
    below the mean, down where it is above (loss-free balancing, arXiv 2408.15664, algorithm 1). `joint` ones keep 0."""
    routed = torch.ones_like(load, dtype=torch.bool) if joint is None else ~joint
    mean = (load * routed).sum() / routed.sum().clamp(min=1)
    return bias + rate * (mean - load).sign() * routed


def softmax_over(logits: Logits, kept: Bool[Tensor, "*lead expert"]) -> Gates:
    """Softmax weights of the kept experts, exact zeros elsewhere, and in a row that keeps none."""
    # Not a division of probabilities, which may all be tiny; the floor is finite, because a row that
    # keeps none must not turn into NaN.
    return torch.softmax(logits.float().masked_fill(~kept, -1e30), dim=-1).masked_fill(~kept, 0.0)


def top_p_gates(
    logits: Logits, p: float | int, mask: Mask = None, joint: Joint = None, renormalize: bool = True
) -> Gates:
    """The smallest set of experts whose probabilities reach `p`, weights renormalised over it, exact zeros elsewhere
    (Harder Tasks Need More Experts, arXiv 2403.07652, eq. 5). `mask`, `joint` and `renormalize` as in `top_k_gates`."""
    logits = logits.float()
    able = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    rivals = able if joint is None else able & ~joint
    probs, order = softmax_over(logits, rivals).sort(dim=-1, descending=True, stable=True)
    needed = (probs.cumsum(-1) - probs < p) & (probs > 0)
    kept = torch.zeros_like(rivals).scatter(-1, order, needed)
    kept = kept if joint is None else kept | (able & joint)
    return softmax_over(logits, kept) if renormalize else softmax_over(logits, able) * kept


def threshold_gates(
    logits: Logits, threshold: Float[Tensor, "*#lead 1"] | float | int, mask: Mask = None, joint: Joint = None
) -> Gates:
    """What a probability is above the threshold, relu(p - t), divided by the row's sum; a row with none: zeros. AdaMoLE
    (arXiv 2405.00361, eq. 6-8). The threshold of `joint` experts is 0; `mask` as in `top_k_gates`."""
    able = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    probs = softmax_over(logits, able)
    above = F.relu(probs - (threshold if joint is None else threshold * ~joint))
    total = above.sum(-1, keepdim=True)
    return above / total.where(total > 0, torch.ones_like(total))


def likeness_gates(logits: Logits) -> Gates:
    """Each cosine over the temperature, of 0 or more, divided by their sum where that is above 1. FedDPA's weight of a
    client's own adapter (NeurIPS 2024), whose factor of a half is a temperature of 2."""
    gates = logits.float().clamp(min=0)
    return gates / gates.sum(-1, keepdim=True).clamp(min=1)


def cut_gates(gates: Gates, threshold: float | int | None, normalize: bool) -> Gates:
    """Gates above the threshold as they are, exact zeros elsewhere, then each row to the sum 1 where asked for.

    The sparse gate of the heterogeneous MoA (arXiv 2506.05928), and the normalised skills of Polytropon
    (arXiv 2202.13914, eq. 2).
    """
    if threshold is not None:
        gates = gates * (gates > threshold)
    return gates / gates.sum(-1, keepdim=True).clamp(min=1e-12) if normalize else gates


def mixed_logits(
    token: Float[Tensor, "*lead choice"], sample: Float[Tensor, "*#lead choice"], depth: Float[Tensor, " 1"]
) -> Float[Tensor, "*lead choice"]:
    """log(w softmax(sample) + (1 - w) softmax(token)), w = sigmoid(depth): shares of two deciders, as logits of the
    kind that chooses (HMoRA, ICLR 2025)."""
    one, other = F.logsigmoid(depth) + sample.log_softmax(-1), F.logsigmoid(-depth) + token.log_softmax(-1)
    return torch.logaddexp(one, other)


def fused_logits(
    scores: Float[Tensor, "*lead choice"], gates: Float[Tensor, "*#lead choice"], banks: Sequence[int]
) -> Float[Tensor, "*lead choice"]:
    """log(share of its bank x gate in its bank), with the logarithms of `gates` and the bank of each choice.

    Shares are a softmax over banks of what the bank's answer scores: the sum of its experts' scores, each times its
    gate (SMoLoRA, arXiv 2411.13949).
    """
    member = F.one_hot(torch.tensor(banks, device=scores.device)).to(scores.dtype)  # [choice, bank]
    shares = ((scores * gates.exp()) @ member).log_softmax(-1)
    return shares @ member.t() + gates


def straight_through(gates: Gates, probs: Gates) -> Gates:
    """The values of the gates, to the bit, and the gradient of the probabilities (arXiv 1308.3432)."""
    return gates.detach() + (probs - probs.detach())


NOISES: dict[str, Callable[[torch.Size], Tensor]] = {
    "gaussian": torch.randn,
    "learned": torch.randn,
    "gumbel": lambda shape: -torch.empty(shape).exponential_().clamp(min=1e-30).log(),
    "logistic": lambda shape: torch.rand(shape).clamp(1e-6, 1 - 1e-6).logit(),
}


def draw_noise(noise: str, like: Logits) -> Logits:
    """Noise of scale 1, from the one stream of random numbers on the CPU: the same draws on every device."""
    return NOISES[noise](like.shape).to(like.device, non_blocking=True)


def one_hot_gates(
    expert_ids: Int[Tensor, " batch"], num_experts: int, joint: Joint = None
) -> Float[Tensor, "batch expert"]:
    """The oracle's gates: one expert each; id -1 (unknown) gets the uniform mixture, and
    id `num_experts` (the null expert) zeros. `joint` experts share each sample's sum alike with its own."""
    known = expert_ids >= 0
    gates = F.one_hot(expert_ids.clamp(min=0), num_experts + 1)[:, :num_experts].float()
    if joint is not None:
        gates = gates.masked_fill(joint, 1.0)
        gates = gates / gates.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known[:, None], gates, torch.full_like(gates, 1.0 / max(num_experts, 1)))


def apply_availability(gates: Gates, available: Bool[Tensor, "*#lead expert"]) -> Gates:
    """Exact zeros where an expert is not available; the others keep the row's sum. A row whose available experts all
    had weight zero shares its sum equally among them."""
    masked = gates * available
    total = gates.sum(-1, keepdim=True)
    kept = masked.sum(-1, keepdim=True)
    count = available.sum(-1, keepdim=True).clamp(min=1)
    shared = available.to(gates.dtype) / count
    tiny = torch.finfo(gates.dtype).tiny
    return torch.where(kept > tiny, masked / kept.clamp(min=tiny), shared) * total


def anchor_sums(
    sums: Sums, counts: Counts, features: Float[Tensor, "batch feature"], present: Bool[Tensor, " batch"],
    expert_ids: Int[Tensor, " batch"],
) -> tuple[Sums, Counts]:  # fmt: skip
    """Add a batch of evidence to the running sum and count of each sample's expert. Sums and counts can be added up
    over processes. Rows without the evidence or a known expert (id -1) are left out."""
    used = (present & (expert_ids >= 0)).to(sums.dtype)
    one_hot = F.one_hot(expert_ids.clamp(min=0), sums.shape[0]).to(sums.dtype) * used[:, None]
    return sums + one_hot.T @ features.to(sums.dtype), counts + one_hot.sum(0)


def anchor_similarity(
    sums: Sums, counts: Counts, features: Float[Tensor, "batch feature"], present: Bool[Tensor, " batch"],
    centred: bool = True,
) -> Float[Tensor, "batch expert"]:  # fmt: skip
    """Cosine of each sample's evidence with each expert's mean evidence, 0 where either is missing.

    Both are relative to the mean over all experts where `centred`: raw evidence of one encoder points nearly one way.
    Unlike in HiDe-LLaVA a sample is compared for itself, so that its gates do not depend on its batch.
    """
    seen = counts > 0
    anchors = sums / counts.clamp(min=1)[:, None]
    centre = (sums.sum(0) / counts.sum().clamp(min=1))[None] * centred
    anchors, features = (anchors - centre) * seen[:, None], features.to(sums.dtype) - centre
    cosine = F.normalize(features, dim=-1) @ F.normalize(anchors, dim=-1).T
    return cosine * (present[:, None] & seen[None])
