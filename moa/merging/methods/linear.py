"""Linear merging methods: sums of the experts' updates, exact in core space.

A method is a function of a stack of matrices, the experts' weights, and its options by keyword; it returns the merged
matrix. All but `slerp` and `karcher`, whose coefficients depend on the updates, are the updates of some mixture.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moa.files.targets import finds
from moa.merging.methods.stack import Stack

Weights = Float[Tensor, " expert"]
Matrix = Float[Tensor, "rows cols"]
PARALLEL = 0.9995  # cosine above which an arc is a line, as in mergekit's slerp
TINY = 1e-8  # norm below which an update has no direction


def linear(stack: Stack, weights: Weights) -> Matrix:
    """Weighted sum of the updates, the weights taken as they are; by default their mean."""
    return stack.map(lambda start, block: torch.einsum("e,erc->rc", weights, block))


def task_arithmetic(stack: Stack, weights: Weights, *, scale: float = 1.0) -> Matrix:
    """Sum of the updates times `scale`; a negative weight forgets, [1,1,-1] is the analogy C + B - A."""
    return scale * linear(stack, weights)


def lines(stack: Stack, weights: Weights, *, first: float = 0.1, last: float = 1.0) -> Matrix:
    """Weighted sum, scaled from `first` at the first layer to `last` at the last one, by depth in between."""
    return (first + (last - first) * stack.depth) * linear(stack, weights)


def sa_merge(
    stack: Stack, weights: Weights, *, share: float = 0.5, decay: float = 1.0, sites: str = r"\.(q|k|v)_proj$"
) -> Matrix:
    """Two experts: share ** (decay * depth) of the first, the rest of the second, at `sites`; elsewhere the first."""
    if len(stack.experts) != 2:
        raise ValueError(f"method: sa_merge takes two experts, got {len(stack.experts)}")
    own = share ** (decay * stack.depth) if finds(sites, stack.site, "options.sites") else 1.0
    return linear(stack, weights * weights.new_tensor([own, 1 - own]))


def slerp(stack: Stack, weights: Weights) -> Matrix:
    """Two experts on the arc between their updates, the second's share of the weights being the way along it."""
    if len(stack.experts) != 2:
        raise ValueError(f"method: slerp takes two experts, got {len(stack.experts)}; use karcher")
    total = weights.sum()
    if total.abs() < TINY:
        raise ValueError("weights: of slerp must not sum to 0")
    way = weights[1] / total
    gram = inner_products(stack)
    norms = gram.diagonal().sqrt()
    cosine = gram[0, 1] / norms.prod() if norms.min() > TINY else gram.new_ones(())
    if cosine.abs() > PARALLEL:
        return linear(stack, torch.stack([1 - way, way]))
    angle = cosine.arccos()
    sines = torch.stack([((1 - way) * angle).sin(), (way * angle).sin()])
    return linear(stack, sines / angle.sin())


def karcher(stack: Stack, weights: Weights, *, max_iterations: int = 50, tolerance: float = 1e-9) -> Matrix:
    """The mean direction of the updates on the sphere, at the weighted mean of their norms."""
    gram = inner_products(stack)
    norms = gram.diagonal().clamp(min=0).sqrt()
    live = norms > TINY
    if not live.any():
        return linear(stack, torch.zeros_like(weights))
    share = torch.where(live, weights, 0.0)
    if share.sum().abs() < TINY:
        raise ValueError("weights: of karcher must not sum to 0")
    share = share / share.sum()
    unit = torch.where(live, 1 / norms.clamp(min=TINY), 0.0)
    cosines = gram * unit[:, None] * unit
    mean = _on_sphere(share, cosines)  # coefficients of the unit updates
    for _ in range(max_iterations):
        towards = (cosines @ mean).clamp(-1, 1)
        # Of the tangent at the mean that leads to each expert, in the same coefficients.
        angle = towards.arccos()
        stretch = share * torch.where(angle > TINY, angle / angle.sin().clamp(min=TINY), 1.0)
        step = stretch - (stretch @ towards) * mean
        length = (step @ cosines @ step).clamp(min=0).sqrt()
        if length < tolerance:
            break
        mean = _on_sphere(length.cos() * mean + length.sin() / length * step, cosines)
    return linear(stack, mean * unit * (share @ norms))


def _on_sphere(coefficients: Tensor, cosines: Tensor) -> Tensor:
    length = (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
    if length < TINY:
        raise ValueError("weights: of karcher point in opposite directions, and leave no mean")
    return coefficients / length


def model_stock(stack: Stack, weights: Weights) -> Matrix:
    """Mean of the updates times N cos / (1 + (N - 1) cos), with the mean cosine between them: no data, no tuning."""
    gram = inner_products(stack)
    norms = gram.diagonal().clamp(min=0).sqrt()
    count = len(weights)
    if count == 1:
        return linear(stack, weights)
    cosines = gram / (norms[:, None] * norms).clamp(min=TINY**2)
    mean = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    ratio = count * mean / (1 + (count - 1) * mean)
    return ratio * linear(stack, weights)


def inner_products(stack: Stack) -> Float[Tensor, "expert expert"]:
    """<dW_i, dW_j> of every pair."""
    return sum((torch.einsum("erc,frc->ef", block, block) for _, block in stack.blocks()), start=torch.zeros(()))
