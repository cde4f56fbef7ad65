"""Least squares on the experts' own inputs: the update whose outputs are nearest to each expert's where that works.

    M = (sum_k w_k M_k S_k) (sum_k w_k S_k)^-1,    S_k = C_k + ridge t I,    t = trace(sum_k w_k C_k) / (sum_k w_k cols)

C_k is the second moment of expert k's inputs in the axes of the columns, divided by its tokens. The ridge is in both
sums: a direction that no expert has input in gets the weighted mean, and one expert alone is itself at any ridge.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.methods.linear import Matrix, Weights
from moa.merging.methods.method import check_share
from moa.merging.methods.stack import Stack

ROUNDS = 20  # of worst-task weights
TINY = 1e-300


def regmean(
    stack: Stack, weights: Weights, *, nondiagonal: float = 1.0, ridge: float = 0.01, balance: bool = False
) -> Matrix:
    """Least squares on each expert's inputs; `nondiagonal` shrinks moments off the diagonal, `balance` evens tasks.

    Jin et al. 2023, equation 2; shrinking as in their section 4.2. `balance` weighs an expert by |M_k|^2 / E|M_k x|^2,
    as IterIS (Chen et al. 2025) does with whole weights.
    """
    check_share("nondiagonal", nondiagonal)
    moments = lambda k: shrink(stack.moments(k), nondiagonal) if stack.ranks[k] else None  # noqa: E731
    return least_squares(stack.whole(), weights, moments, ridge=ridge, balance=balance, where=stack.site)


def core_regmean(
    stack: Stack,
    weights: Weights,
    *,
    ridge: float = 0.01,
    balance: bool = False,
    worst: float = 0.0,
    directions: int = 0,
) -> Matrix:
    """Least squares within the experts' input directions, and `directions` more of each expert that set it apart.

    SSR-Merge (2026) with the ridge in orthonormal axes, so how an expert is factored does not matter. `worst` above 0
    raises the weights of the experts that the result serves worst, by exp(worst * relative error) in each of 20 rounds.
    """
    if worst < 0 or directions < 0:
        raise ValueError(f"options.{'worst' if worst < 0 else 'directions'}: must be 0 or more")
    moments = [stack.moments(k) if rank else None for k, rank in enumerate(stack.ranks)]
    matrices, own = stack.whole(), moments.__getitem__
    found: list[tuple[float, Matrix]] = []
    for _ in range(ROUNDS + 1 if worst else 1):
        merged = least_squares(matrices, weights, own, ridge=ridge, balance=balance, where=stack.site)
        live = relative_errors(matrices, moments, merged) * (weights > 0)
        found.append((float(live.max()), merged))
        weights = weights * (worst * (live - live.max())).exp()
    return min(found, key=lambda pair: pair[0])[1]


def tada(stack: Stack, weights: Weights, *, conflict: float = 0.5) -> Matrix:
    """Each site's mean by how strongly an expert answers its own inputs, for its size, without what others undo.

    TaDA: gates g_k ~ (E|M_k x_k|^2)^(1/2) / |M_k|, for any number of experts. A singular direction of which the others,
    so weighed, take back more than the share `conflict` is left out: this rule is our reading of an abstract.
    """
    check_share("conflict", conflict)
    matrices = stack.whole()
    gates = weights.clone()
    for k, rank in enumerate(stack.ranks):
        energy = float(matrices[k].square().sum()) if rank else 0.0
        gates[k] *= (output_energy(matrices[k], stack.moments(k)) / energy) ** 0.5 if energy else 0.0
    total = gates.abs().sum()
    weighed = matrices * (gates / total if total else gates)[:, None, None]
    merged, whole = torch.zeros_like(matrices[0]), weighed.sum(0)
    for own in weighed:
        u, s, v = torch.linalg.svd(own, full_matrices=False)
        others = torch.einsum("ri,rc,ic->i", u, whole - own, v)
        merged += (u * s * (others >= -conflict * s)) @ v
    return merged


def relative_errors(
    matrices: Float[Tensor, "expert rows cols"], moments: list[Tensor | None], merged: Matrix
) -> Float[Tensor, " expert"]:
    """E|(M - M_k) x_k|^2 / E|M_k x_k|^2 of every expert; 0 where it does nothing."""
    errors = matrices.new_zeros(len(matrices))
    for k, own in enumerate(moments):
        if own is not None and (energy := output_energy(matrices[k], own)) > TINY:
            errors[k] = output_energy(merged - matrices[k], own) / energy
    return errors


def output_energy(matrix: Matrix, moments: Float[Tensor, "cols cols"]) -> float:
    """E|M x|^2"""
    return float(((matrix @ moments) * matrix).sum().clamp(min=0))


def shrink(moments: Float[Tensor, "cols cols"], nondiagonal: float) -> Float[Tensor, "cols cols"]:
    """All but the diagonal times `nondiagonal`."""
    return torch.diag(moments.diagonal()) * (1 - nondiagonal) + nondiagonal * moments


def least_squares(
    matrices: Float[Tensor, "expert rows cols"],
    weights: Weights,
    moments: Callable[[int], Float[Tensor, "cols cols"] | None],
    *,
    ridge: float,
    balance: bool = False,
    where: str = "",
) -> Matrix:
    """The solution of the module's equation; an expert without moments has no part in it.

    Raises ValueError for weights below 0 and, naming `where`, for inputs that are all zero, or that leave the result
    open at this ridge.
    """
    if ridge < 0 or (weights < 0).any():
        key = "options.ridge" if ridge < 0 else "weights"
        raise ValueError(f"{key}: of least squares must be 0 or more, got {ridge if ridge < 0 else weights.tolist()}")
    cols = matrices.shape[2]
    total, target = matrices.new_zeros(cols, cols), torch.zeros_like(matrices[0])
    mean, shares = torch.zeros_like(target), 0.0
    for k, share in enumerate(weights.tolist()):
        own = moments(k) if share else None
        if own is None:
            continue
        if balance:
            share *= float(matrices[k].square().sum()) / max(output_energy(matrices[k], own), TINY)
        total += share * own
        target += share * (matrices[k] @ own)
        mean, shares = mean + share * matrices[k], shares + share
    if not shares:
        return target
    level = float(total.trace()) / (shares * cols)
    if level <= 0:
        raise ValueError(f"{where}: every input of the experts is zero there")
    total.diagonal().add_(ridge * level * shares)
    lower, failed = torch.linalg.cholesky_ex(total)
    pivots = lower.diagonal().square()
    if int(failed) or pivots.min() <= cols * torch.finfo(total.dtype).eps * pivots.max():
        raise ValueError(f"options.ridge: {ridge} leaves directions open that no input at {where} has; raise it")
    return torch.cholesky_solve((target + ridge * level * mean).T, lower).T
