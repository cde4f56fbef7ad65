"""Direction-aware merging: on the singular directions of the updates, not on their entries.

Defined on the dense updates, computed on the core matrices, which have the same singular values: on a dense
reconstruction most directions are rounding, and a method that counts or flattens them returns noise.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.methods.linear import Matrix, Weights, linear
from moa.merging.methods.method import check_choice, check_share
from moa.merging.methods.sparse import elect, trim
from moa.merging.methods.stack import Stack, stack_of

RANK_TOLERANCE = 1e-7  # of the largest singular value: below it a direction is rounding
Triplets = tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "cols rank"]]


def tsv_m(stack: Stack, weights: Weights, *, share: float = 1.0) -> Matrix:
    """Each expert's leading singular directions (the share of its rank), made orthogonal between experts and added."""
    check_share("share", share)
    parts = [leading(m, _count(share, r)) for m, r in zip(stack.whole(), stack.ranks, strict=True)]
    u, v = _frames(parts)
    s = torch.cat([w * p[1] for w, p in zip(weights, parts, strict=True)])
    return (u * s) @ v.T


def iso_c(stack: Stack, weights: Weights) -> Matrix:
    """The sum with all its singular values replaced by their mean: no direction drowns another."""
    u, s, v = leading(linear(stack, weights))
    return s.mean() * u @ v.T if s.numel() else linear(stack, weights)


def iso_cts(stack: Stack, weights: Weights, *, common: float = 0.8) -> Matrix:
    """As iso_c on the sum's leading directions (the share `common`), and each expert's own outside of them."""
    check_share("common", common)
    u, s, v = leading(linear(stack, weights))
    count = len(weights)
    own = (s.numel() - _count(common, s.numel())) // count  # directions that each expert adds
    shared = s.numel() - own * count
    parts = [(u[:, :shared], s[:shared], v[:, :shared])]
    for weight, matrix in zip(weights, stack.whole(), strict=True):
        rest = weight * (matrix - parts[0][0] @ (parts[0][0].T @ matrix))
        parts.append(leading(rest, own))
    parts = [part for part in (*parts[1:], parts[0]) if part[1].numel()]
    if not parts:
        return linear(stack, weights)
    u, v = _frames(parts)
    return torch.cat([p[1] for p in parts]).mean() * u @ v.T


def wudi(
    stack: Stack, weights: Weights, *, time: float = 0.0, normalise: bool = True, directions: str = "all"
) -> Matrix:
    """Least interference, sum_i |(W - dW_i) dW_i^T|^2 / |dW_i|^2, in closed form; by flow from the sum for `time` > 0.

    `time` is learning rate times steps of the gradient descent that the papers run (from the sum in WUDI; OptMerge
    starts from the mean, which `weights` of 1/N give); 0 is its limit. Without `normalise` no |dW_i|^2 divides
    (ActMerge, 2026). `directions=leading` is ASWUDI (2026): the optimum along the (sum sqrt(l))^2 / sum l leading ones
    of the interference's eigenvalues l, the weighted sum along the others.
    """
    check_choice("directions", directions, ("all", "leading"))
    matrices = stack.whole()
    energy = matrices.square().sum((1, 2))
    live = energy > 0
    if not live.any():
        return linear(stack, weights)
    share = torch.where(live, 1 / energy.clamp(min=torch.finfo(energy.dtype).tiny), 0.0)
    share = share if normalise else live.to(energy.dtype)
    gram = torch.einsum("e,erc,erd->cd", share, matrices, matrices)
    wanted = torch.einsum("e,erc,esc,esd->rd", share, matrices, matrices, matrices)
    values, axes = torch.linalg.eigh(gram)
    held = values > RANK_TOLERANCE * values.max()
    optimum = wanted @ (axes * torch.where(held, 1 / values, 0.0)) @ axes.T
    if time == 0 and directions == "all":
        return optimum
    start = linear(stack, weights)
    values = values.clamp(min=0)
    # of the gap to the optimum, along each axis
    left = torch.exp(-2 * time * values) if time else torch.zeros_like(values)
    if directions == "leading":
        left[: max(len(values) - math.ceil(values.sqrt().sum() ** 2 / values.sum()), 0)] = 1.0
    return optimum + (start - optimum) @ (axes * left) @ axes.T


def pico(stack: Stack, weights: Weights, *, then: str = "linear") -> Matrix:
    """Shorten the output directions that hold most of all experts' energy, then merge by `then` (linear, ties, tsv_m).

    Of every update, 1 / (1 + (N - 1) c_i) is left along the eigenvector i of sum_k dW_k dW_k^T, which holds the share
    c_i of its trace. The released code takes the B alone, so that how an expert is factored decides. The paper's last
    step, the experts' mean norm, is `norm=mean` of any merge.
    """
    check_choice("then", then, ("linear", "ties", "tsv_m"))
    matrices = stack.whole()
    energy, axes = torch.linalg.eigh((matrices @ matrices.mT).sum(0))
    if energy.sum() <= 0:
        return linear(stack, weights)
    count = int((matrices.square().sum((1, 2)) > 0).sum())
    left = 1 / (1 + (count - 1) * energy.clamp(min=0) / energy.sum())
    even = (axes * left) @ axes.T @ matrices
    if then == "ties":
        return _voted(stack, even, weights, 0.2)
    inner = stack_of(site=stack.site, experts=stack.experts, matrices=even, ranks=stack.ranks)
    return tsv_m(inner, weights) if then == "tsv_m" else linear(inner, weights)


def ct_merge(stack: Stack, weights: Weights, *, size: int = 16) -> Matrix:
    """The sum within `size` directions that most experts share, each at the root mean square of its experts' values.

    CT-Merging: the leading eigenvectors of the mean projectors on the experts' output and input directions, in which
    every direction of an expert counts alike. The sum's singular values are replaced by sum_k w_k p_k rms_k with
    p_k = |U_k^T u|^2 of expert k: this weighing is our reading of an abstract.
    """
    parts = [leading(m, r) for m, r in zip(stack.whole(), stack.ranks, strict=True)]
    u, v = (_principal(torch.cat([p[side] for p in parts], 1)[None], size) for side in (0, 2))
    turn_u, _, turn_v = leading(u.T @ linear(stack, weights) @ v)
    u, v = u @ turn_u, v @ turn_v
    shares = torch.stack([(p[0].T @ u).square().sum(0) for p in parts])  # [expert, direction]
    level = torch.stack([p[1].square().sum() / max(p[1].numel(), 1) for p in parts]).sqrt()
    return (u * ((weights * level) @ shares)) @ v.T


def score(stack: Stack, weights: Weights, *, share: float = 1.0, deviations: float = 1.96) -> Matrix:
    """In the frame of tsv_m, the experts' own values, and between two directions only values that are not outliers.

    SCORE keeps what lies within `deviations` standard deviations of the values off the diagonal. Here about 0, as their
    mean depends on the free signs of singular vectors, and without the diagonal's zeros, which the released code has.
    """
    check_share("share", share)
    matrices = stack.whole()
    parts = [leading(m, _count(share, r)) for m, r in zip(matrices, stack.ranks, strict=True)]
    u, v = _frames(parts)
    inside = u.T @ matrices @ v  # [expert, direction, direction]
    own = torch.eye(inside.shape[1], dtype=torch.bool)
    spread = inside[:, ~own].square().mean(1).sqrt() if len(own) > 1 else inside.new_zeros(len(inside))
    kept = torch.where(own | (inside.abs() < deviations * spread[:, None, None]), inside, 0.0)
    return u @ torch.einsum("e,erc->rc", weights, kept) @ v.T


def nufilt(stack: Stack, weights: Weights, *, protected: int = 128, own: int = 8) -> Matrix:
    """One update T after the other: W <- W + T (1 - U U^T) + X, U the leading `protected` input directions of W so far.

    X, with T's outputs, makes the result answer T's `own` leading input directions as T does, and the protected ones as
    W did, by least squares: the optimum that NuFilt's 50 steps of Adam on a LoRA approach. The released program takes
    arbitrary directions from the first update too, as of zero any are leading.
    """
    merged = torch.zeros_like(stack.whole()[0])
    for update in weights[:, None, None] * stack.whole():
        (left, _, reads), u = leading(update), leading(merged, protected)[2]
        if not reads.numel():
            continue
        v, lost = reads[:, :own], update @ u @ u.T
        wanted = torch.cat([(lost - merged) @ v, update.new_zeros(len(update), u.shape[1])], 1)
        inverse = torch.linalg.pinv(torch.cat([v, u], 1), rtol=RANK_TOLERANCE)
        merged = merged + update - lost + left @ (left.T @ wanted) @ inverse
    return merged


def dc_merge(stack: Stack, weights: Weights, *, smooth: str = "mean", density: float = 0.001) -> Matrix:
    """Level each expert's singular values, meet in one space that covers all experts, and vote there as TIES does."""
    check_choice("smooth", smooth, ("mean", "linear", "none"))
    parts = [leading(m, r) for m, r in zip(stack.whole(), stack.ranks, strict=True)]
    u, v = _frames(parts)
    if not u.shape[1]:
        return linear(stack, weights)  # nothing but zeros
    covered = torch.stack([u.T @ (p[0] * _levelled(p[1], smooth)) @ p[2].T @ v for p in parts])
    merged = _voted(stack, covered, weights, density)
    # Only entries between directions of one expert remain: those between two are interference.
    own = torch.block_diag(*[torch.ones(p[1].numel(), p[1].numel()) for p in parts])
    return u @ (merged * own.to(merged.dtype)) @ v.T


def _levelled(s: Float[Tensor, " rank"], how: str) -> Tensor:
    """Singular values brought together, their sum kept: equal, or falling in a line at a ratio of 5 at most."""
    if how == "none" or not s.numel():
        return s
    if how == "mean":
        return s.mean().expand_as(s)
    ratio = min(5.0, float(s[0] / s[-1].clamp(min=torch.finfo(s.dtype).tiny)))
    line = torch.linspace(ratio, 1.0, s.numel(), dtype=s.dtype)
    return line * s.sum() / line.sum()


def ctm(
    stack: Stack,
    weights: Weights,
    *,
    size: int = 16,
    even: float = 0.0,
    density: float = 0.2,
    reduce: str = "mean",
    iterations: int = 50,
) -> Matrix:
    """Compress, then merge: the best common subspace of `size` directions first, then TIES inside of it.

    Nothing that the vote decided is cut by the export's rank. `even` = 1 weighs every expert alike, 0 by its norm.
    """
    matrices = stack.whole()
    norms = matrices.square().sum((1, 2)).sqrt()
    target = (1 - even) * norms + even * norms.mean()
    # An expert without an update has no direction to lengthen.
    scaled = matrices * torch.where(norms > 0, target / norms, 0.0)[:, None, None]
    v = _principal(scaled.mT, size)  # higher-order SVD, then alternating refinement (HOOI)
    for _ in range(iterations):
        u = _principal(scaled @ v, size)
        v_next = _principal(scaled.mT @ u, size)
        moved = (v_next @ v_next.T - v @ v.T).abs().max()
        v = v_next
        if moved < RANK_TOLERANCE:
            break
    return u @ _voted(stack, u.T @ matrices @ v, weights, density, reduce) @ v.T


def _voted(
    stack: Stack, matrices: Float[Tensor, "expert rows cols"], weights: Weights, density: float, reduce: str = "mean"
) -> Matrix:
    """TIES on other matrices of the stack's experts."""
    inner = stack_of(site=stack.site, experts=stack.experts, matrices=matrices)
    return elect(trim(matrices, inner.thresholds(density)), weights, inner.rounding, reduce=reduce)


def _principal(matrices: Float[Tensor, "expert size cols"], count: int) -> Float[Tensor, "size _"]:
    """The directions that hold most of the energy of all matrices together."""
    axes = torch.linalg.eigh((matrices @ matrices.mT).sum(0)).eigenvectors.flip(1)[:, :count]
    return axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))


def leading(matrix: Float[Tensor, "rows cols"], count: int | None = None) -> Triplets:
    """The `count` leading singular triplets, at most the numerical rank; all of that by default."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    live = int((s > RANK_TOLERANCE * s.max()).sum()) if s.numel() else 0
    size = live if count is None else min(count, live)
    return u[:, :size], s[:size], v[:size].T


def polar(vectors: Float[Tensor, "size count"]) -> Float[Tensor, "size count"]:
    """The nearest matrix with orthonormal columns, or rows where there are more columns (Procrustes)."""
    u, s, v = torch.linalg.svd(vectors, full_matrices=False)
    live = s > RANK_TOLERANCE * s.max() if s.numel() else s > 0
    return u[:, live] @ v[live]


def _frames(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> tuple[Float[Tensor, "rows all"], Float[Tensor, "cols all"]]:
    """All experts' left and right directions side by side, made orthogonal to each other."""
    return polar(torch.cat([p[0] for p in parts], 1)), polar(torch.cat([p[2] for p in parts], 1))


def _count(share: float, rank: int) -> int:
    return max(int(share * rank), 1) if rank else 0
