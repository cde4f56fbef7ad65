"""Merging A and B apart: reproductions of published methods, which are not functions of the updates.

Writing an expert as (B R, R^-1 A), the same update, changes every result here, and sums of factors hold products of one
expert's B with another's A. Use `linear`, `ties` and the like, unless a published number is to be reproduced.
"""

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moa.merging.methods.linear import Weights
from moa.merging.methods.method import check_choice, check_share
from moa.merging.methods.stack import Stack
from moa.routing.clusters import best_clusters

Pair = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]
TINY = 1e-12


def robustmerge(
    a: Stack,
    b: Stack,
    weights: Weights,
    *,
    variant: str = "paper_per_task",
    density: float = 0.2,
    strength: float = 2.0,
) -> Pair:
    """Prune small values of A and B, and scale each rank by what its row of A lost, normalised between experts.

    `paper_per_task` adds the experts' products (Zeng et al. 2025, algorithm 1), `paper_factor_sum` multiplies the
    sums (its later equation 5), `official_code` is the released procedure, which multiplies sums, counts `strength`
    twice, and lifts every scale to the 80th percentile of its expert's. A row of A without a survivor is not scaled;
    there the released code gives NaN.
    """
    check_choice("variant", variant, ("paper_per_task", "paper_factor_sum", "official_code"))
    check_share("density", density)
    all_a, all_b = a.whole(), b.whole()
    kept_a, kept_b = keep_largest(all_a, density), keep_largest(all_b, density)
    lost = row_scales(all_a, kept_a)  # [expert, rank]
    if variant == "official_code":
        ordered = lost.sort(1).values
        lost = lost.clamp(min=ordered[:, int(lost.shape[1] * 0.8), None])
    share = weights[:, None] * lost / lost.sum(0)
    scaled_b = strength * share[:, None] * kept_b
    if variant == "paper_per_task":
        return kept_a.flatten(0, 1), torch.cat(list(scaled_b), 1)
    again = strength if variant == "official_code" else 1.0
    return again * kept_a.sum(0), scaled_b.sum(0)


def row_scales(
    full: Float[Tensor, "*expert rank in"], kept: Float[Tensor, "*expert rank in"]
) -> Float[Tensor, "*expert rank"]:
    """How many times larger each row's sum of magnitudes was before pruning; 1 for a row without a survivor."""
    left = kept.abs().sum(-1)
    return torch.where(left > 0, full.abs().sum(-1) / left.clamp(min=TINY), 1.0)


def keep_largest(matrices: Float[Tensor, "expert rows cols"], density: float) -> Tensor:
    """Each matrix with the share `density` of its values that is largest, zeros elsewhere."""
    flat = matrices.abs().flatten(1)
    limit = flat.kthvalue(max(int(flat.shape[1] * (1 - density)), 1), dim=1).values
    return torch.where(matrices.abs() >= limit[:, None, None], matrices, 0.0)


def lorahub_factors(a: Stack, b: Stack, weights: Weights) -> Pair:
    """(sum of w_i B_i)(sum of w_i A_i), as the released LoraHub: quadratic in the weights, and w is as good as -w."""
    return (torch.einsum("e,erc->rc", weights, a.whole()), torch.einsum("e,erc->rc", weights, b.whole()))


def aligned_linear(a: Stack, b: Stack, weights: Weights, *, align: str = "procrustes", sweeps: int = 10) -> Pair:
    """Means of A and of B, after each expert's rank axis was turned (or permuted) to agree with the others' mean.

    `balanced` first rewrites every expert with A and B of one spectrum, and then turns it: what an expert's factors
    were, (B R, R^-1 A) with any R, no longer matters.
    """
    check_choice("align", align, ("procrustes", "permutation", "balanced"))
    turn = _permutation if align == "permutation" else _rotation
    all_a, all_b = a.whole().clone(), b.whole().clone()
    if align == "balanced":
        all_a, all_b = _balanced(all_a, all_b)
    for _ in range(sweeps):
        for own in range(len(weights)):
            if others := [i for i in range(len(weights)) if i != own]:
                rest_a, rest_b = all_a[others].mean(0), all_b[others].mean(0)
                r = turn(all_a[own] @ rest_a.T + all_b[own].T @ rest_b)
                all_a[own], all_b[own] = r.T @ all_a[own], all_b[own] @ r
    return (torch.einsum("e,erc->rc", weights, all_a), torch.einsum("e,erc->rc", weights, all_b))


def _balanced(
    all_a: Float[Tensor, "expert rank in"], all_b: Float[Tensor, "expert out rank"]
) -> tuple[Float[Tensor, "expert rank in"], Float[Tensor, "expert out rank"]]:
    """The same products, each singular value shared evenly by its row of A and its column of B."""
    q_a, r_a = torch.linalg.qr(all_a.mT)
    q_b, r_b = torch.linalg.qr(all_b)
    u, s, v = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s.sqrt()
    return (q_a @ (v.mT * root[:, None])).mT, q_b @ (u * root[:, None])


def _rotation(agreement: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    u, _, v = torch.linalg.svd(agreement)
    return u @ v


def _permutation(agreement: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    rows, columns = linear_sum_assignment(agreement.numpy(), maximize=True)
    chosen = torch.zeros_like(agreement)
    chosen[rows, columns] = 1
    return chosen


def lego(a: Stack, b: Stack, weights: Weights, *, size: int = 16, restarts: int = 10, seed: int = 0) -> Pair:
    """Cluster all rank-one parts (row of A, column of B) by k-means into `size` new ones, rescaled as their members.

    Each part is balanced first, so that scaling a row of A against its column of B changes nothing.
    """
    all_a, all_b = a.whole().flatten(0, 1), torch.cat(list(b.whole()), 1).T
    norm_a, norm_b = all_a.norm(dim=1), all_b.norm(dim=1)
    live = (norm_a > TINY) & (norm_b > TINY)
    if not live.any():
        return all_a, all_b.T
    ratio = (norm_b[live] / norm_a[live]).sqrt()[:, None]
    parts = torch.cat([all_a[live] * ratio, all_b[live] / ratio], 1)
    share = weights.repeat_interleave(a.shape[0])[live] * len(weights)
    label = torch.from_numpy(best_clusters(parts.numpy(), min(size, len(parts)), tries=restarts, seed=seed)[1])
    merged = []
    for cluster in range(label.max() + 1):
        own = parts[label == cluster]
        if not len(own):
            continue
        mean = own.mean(0)
        scale = own.abs().amax(1).mean() / mean.abs().max().clamp(min=TINY)
        weight = share[label == cluster].mean() * (len(own) / size) ** 0.5
        merged.append(torch.cat([scale * mean[: a.shape[1]], weight * scale * mean[a.shape[1] :]]))
    factors = torch.stack(merged)
    return factors[:, : a.shape[1]], factors[:, a.shape[1] :].T
