"""Losses on what experts are, rather than on who gets them: computed inside each layer, from its own factors.

    orthogonality   A_i A_j^T = 0: experts read different directions (O-LoRA, arXiv 2310.14152)
    difference      H_i^T H_j = 0: experts answer a batch in different directions (Pilot, arXiv 2501.13985)
    alignment       A x has one mean and variance for all tasks (Align-LoRA, arXiv 2508.05078)

Each is a mean over the pairs of a layer, then over layers. The layer's input gets no gradient.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moa.experts.lora_product import FactorsA, FactorsB

Hidden = Sequence[Float[Tensor, "token _"]]  # A x
Tasks = Int[Tensor, " token"]
Loss = Float[Tensor, ""]
TINY = 1e-12
PADDING = -3  # the task of a token that is none


def orthogonality(factors_a: FactorsA, factors_b: FactorsB, hidden: Hidden, tasks: Tasks) -> Loss:
    """Mean of |A_i A_j^T|^2 / (rank_i rank_j) over the pairs of experts."""
    pairs = [(a @ b.T).square().mean() for a, b in combinations(factors_a, 2)]
    return torch.stack(pairs).mean()


def difference(factors_a: FactorsA, factors_b: FactorsB, hidden: Hidden, tasks: Tasks) -> Loss:
    """Mean of |H_i^T H_j|^2 / (|H_i|^2 |H_j|^2) over the pairs of experts, H = U B^T their outputs and U = A x.

    H_i^T H_j = B_i (U_i^T U_j) B_j^T is as large as a weight, and H_i H_j^T grows with the tokens' square; with
    C = U_i^T U_j and G = B^T B the numerator is tr(G_j C^T G_i C), of ranks alone. The denominator gets no gradient:
    an expert is not to grow. Padding counts for nothing.
    """
    real = (tasks != PADDING)[:, None]
    us = [u * real for u in hidden]
    grams = [b.T @ b for b in factors_b]
    sizes = [((u.T @ u) * gram).sum().detach() for u, gram in zip(us, grams, strict=True)]
    pairs = []
    for i, j in combinations(range(len(us)), 2):
        c = us[i].T @ us[j]
        pairs.append(((grams[i] @ c) * (c @ grams[j])).sum() / (sizes[i] * sizes[j]).clamp(min=TINY))
    return torch.stack(pairs).mean()


def alignment(factors_a: FactorsA, factors_b: FactorsB, hidden: Hidden, tasks: Tasks) -> Loss:
    """Mean over pairs of tasks and over ranks of the symmetric divergence of A x, taken as normal in each rank:

    (KL(p|q) + KL(q|p)) / 2 = (v_p / v_q + v_q / v_p) / 4 - 1/2 + (m_p - m_q)^2 (1 / v_p + 1 / v_q) / 4

    0, and still connected to A, where a batch has tokens of one task alone. Tokens of an unknown task are left out.
    """
    u, found = torch.cat(list(hidden), dim=-1), tasks[tasks >= 0].unique()
    member = (tasks[None] == found[:, None]).to(u.dtype)  # [task, token]
    member = member / member.sum(1, keepdim=True).clamp(min=1)
    mean = member @ u
    variance = (member @ u.square() - mean.square()).clamp(min=0) + 1e-6
    pairs = [
        ((variance[p] / variance[q] + variance[q] / variance[p]) / 4 - 0.5
         + (mean[p] - mean[q]).square() * (1 / variance[p] + 1 / variance[q]) / 4).mean()
        for p, q in combinations(range(len(found)), 2)
    ]  # fmt: skip
    return torch.stack(pairs).mean() if pairs else (u * 0).sum()


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "orthogonality": orthogonality,
    "difference": difference,
    "alignment": alignment,
}
PAIRED = ("orthogonality", "difference")  # of two experts or more
LINEAR = ("difference",)  # of experts whose output is B A x
