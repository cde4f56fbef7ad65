"""How experts relate to each other, and what pruning does to them, at one site: functions of factors and core matrices.

Signs and values are those of the dense update, which no core has: they are read off an even grid of its entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.core import Factors
from moa.merging.methods.factorwise import keep_largest, row_scales

GRID = 256  # rows and columns of a dense update that are sampled
HISTOGRAM_BINS = 41
TINY = 1e-300
Pairwise = Float[Tensor, "expert expert"]


def cosines(cores: Float[Tensor, "expert rows cols"]) -> Pairwise:
    """Between the updates of every pair; 0 with an update of zeros."""
    flat = cores.flatten(1)
    norms = flat.norm(dim=1)
    product = norms[:, None] * norms
    return torch.where(product > 0, flat @ flat.T / product.clamp(min=TINY), 0.0)


def decompose(core: Float[Tensor, "rows cols"]) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [rows, rank], singular values, right vectors [cols, rank] that are more than rounding."""
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    live = s > 1e-9 * s.max()
    return u[:, live], s[live], v[live].T


def subspace_overlap(bases: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Pairwise:
    """Share of directions in common: mean of |U_i^T U_j|^2 / min rank over outputs and inputs, by `decompose`."""
    table = bases[0][0].new_zeros(len(bases), len(bases))
    for i, (u_i, _, v_i) in enumerate(bases):
        for j, (u_j, _, v_j) in enumerate(bases[: i + 1]):
            if size := min(u_i.shape[1], u_j.shape[1]):
                shared = (u_i.T @ u_j).square().sum() + (v_i.T @ v_j).square().sum()
                table[i, j] = table[j, i] = shared / (2 * size)
    return table


def sample_entries(factors: Sequence[Factors | None]) -> Float[Tensor, "expert entries"]:
    """Entries of every dense update on the grid, in single precision; zeros for an expert without the site."""
    a, b = next(pair for pair in factors if pair is not None)
    rows, cols = _evenly(b.shape[0]), _evenly(a.shape[1])
    zero = torch.zeros(len(rows) * len(cols))
    return torch.stack([
        zero if pair is None else (pair[1][rows].float() @ pair[0][:, cols].float()).flatten()
        for pair in factors
    ])  # fmt: skip


def _evenly(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, GRID), dtype=torch.float64).round().long()


def sign_conflict(entries: Float[Tensor, "expert entries"]) -> float:
    """1 - sum |sum_i x_i| / sum sum_i |x_i| over entries: 0 where all pull the same way, 1 where all cancels."""
    mass = entries.abs().sum()
    return float(1 - entries.sum(0).abs().sum() / mass) if mass else 0.0


def sign_disagreement(entries: Float[Tensor, "expert entries"]) -> Pairwise:
    """Share of sum |x_i x_j| whose signs differ: 0.5 by chance, and where two experts do not meet."""
    up, down = entries.clamp(min=0), (-entries).clamp(min=0)
    same, opposite = up @ up.T + down @ down.T, up @ down.T + down @ up.T
    whole = same + opposite
    return torch.where(whole > 0, opposite / whole.clamp(min=1e-37), 0.5).double()


def cross_terms(pairs: Sequence[Factors], weights: Float[Tensor, " expert"]) -> float:
    """|(sum B_i)(sum A_i) - sum B_i A_i| / |sum B_i A_i|, roots of the weights in both: what sums of factors add.

    For experts of one rank. Any |sum_ij c_ij B_i A_j|^2 is tr(X^T G_B X G_A), with G the Gram matrices of all factors
    and X = c (x) 1: nothing larger than they is made.
    """
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    gram_a, gram_b = a @ a.T, b.T @ b
    root = weights.to(a.dtype).abs().sqrt()
    product = root[:, None] * (weights.sign() * root)  # of expert i's B with expert j's A
    same_rank = torch.eye(len(pairs[0][0]), dtype=a.dtype)

    def norm(coefficients: Tensor) -> Tensor:
        x = torch.kron(coefficients.contiguous(), same_rank)
        return ((x.T @ gram_b @ x) * gram_a).sum().clamp(min=0).sqrt()

    own = product.diag().diag()
    wanted = norm(own)
    return float(norm(product - own) / wanted) if wanted else 0.0


def prune(pair: Factors, density: float) -> dict[str, Any]:
    """What RobustMerge's pruning does to one expert: singular values after it and after its scaling, and the scales.

    The largest values of A and of B are kept, and each rank is scaled by what its row of A lost, before the experts'
    scales are normalised against each other (Zeng et al. 2025, equation 3 and figure 3).
    """
    full = pair[0].float()
    a, b = (keep_largest(factor.float()[None], density)[0] for factor in pair)
    scales = row_scales(full, a)
    return {
        "singular_values": product_spectrum(a.double(), b.double()),
        "scaled": product_spectrum(a.double(), (b * scales).double()),
        "scales": scales.tolist(),
        "emptied_rows": int((a == 0).all(1).sum()),
    }


def product_spectrum(a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> list[float]:
    """Singular values of B A, from the factors' Gram matrices: to 1e-8 of the largest."""
    values = torch.linalg.svdvals(_gram_root(b.T @ b) @ _gram_root(a @ a.T).T)
    return values[values > 1e-7 * values.max()].tolist()


def _gram_root(gram: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    """R with R^T R = gram."""
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def histogram(values: Float[Tensor, " count"]) -> dict[str, Any]:
    """Share of values in equal bins up to four standard deviations; the outermost bins hold all beyond."""
    limit = float(4 * values.std(unbiased=False)) or 1.0
    counts = torch.histc(values.clamp(-limit, limit).float(), HISTOGRAM_BINS, -limit, limit)
    return {"limit": limit, "share": (counts / max(values.numel(), 1)).tolist()}
