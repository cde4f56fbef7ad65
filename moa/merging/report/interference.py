"""How experts relate to each other, and what pruning does to them, at one site: functions of factors and core matrices.

Signs and values are those of the dense update, which no core has: they are read off an even grid of its entries.
With the statistics of their inputs, E[x x^T] = L L^T + rest I of moa/statistics, also how strongly experts answer to
each other's inputs, and what a merge changes of their outputs, without a matrix of the outputs' size:

crosstalk   E|dW_j x_k|^2 / E|dW_k x_k|^2 of expert j on the inputs of k, as training logs it
residual    E|(dW - dW_k) x_k|^2 / E|dW_k x_k|^2 of the merged update dW; always-on experts are part of every dW_k
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.adapters import Expert
from moa.merging.core import Factors, inner_product
from moa.merging.methods.factorwise import keep_largest, row_scales
from moa.statistics.moments import Moments

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


def output_energy(update: Factors, moments: Moments) -> float:
    """E|B A x|^2"""
    a, b = update
    within = a @ moments.root.to(a)
    return float(((b.T @ b @ within) * within).sum() + moments.rest * inner_product(update, update))


def joined(updates: Sequence[Factors]) -> Factors:
    """The factors of a sum."""
    return torch.cat([a for a, _ in updates]), torch.cat([b for _, b in updates], dim=1)


def site_crosstalk(
    experts: Sequence[Expert],
    site: str,
    factors: Sequence[Factors | None],
    merged: Factors | None = None,
    shared: Collection[str] = (),
) -> dict[str, Any]:
    """`crosstalk`, at [k][j], and `residual`, at [k], of one site; empty without statistics of any routed expert.

    None at k == j, for `shared` experts, which are always on, and where an expert has no statistics, has not the site,
    or does nothing there, on its own samples.
    """
    if all(expert.inputs is None for expert in experts if expert.name not in shared):
        return {}
    always = [f for e, f in zip(experts, factors, strict=True) if e.name in shared and f is not None]
    table: list[list[float | None]] = [[None] * len(experts) for _ in experts]
    residual: list[float | None] = [None] * len(experts)
    for k, (expert, own) in enumerate(zip(experts, factors, strict=True)):
        if own is None or expert.inputs is None or expert.name in shared:
            continue
        moments = expert.inputs(site)
        energy = output_energy(own, moments) if moments.tokens else 0.0
        if energy <= 0:
            continue
        for j, other in enumerate(factors):
            if j != k and experts[j].name not in shared:
                table[k][j] = output_energy(other, moments) / energy if other is not None else 0.0
        if merged is not None:
            whole = joined([own, *always])
            less = whole[0], -whole[1]
            error = output_energy(joined([(merged[0].to(own[0]), merged[1].to(own[0])), less]), moments)
            residual[k] = error / output_energy(whole, moments)
    return {"crosstalk": table} | ({} if merged is None else {"residual": residual})


def over_sites(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means over the sites that have a value, by pair and by expert."""
    found: dict[str, Any] = {}
    if all("crosstalk" in row for row in rows):
        tables = [row["crosstalk"] for row in rows]
        places = range(len(tables[0]))
        found["crosstalk"] = [[mean([table[k][j] for table in tables]) for j in places] for k in places]
    if all("residual" in row for row in rows):
        found["residual"] = [mean(values) for values in zip(*(row["residual"] for row in rows), strict=True)]
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
