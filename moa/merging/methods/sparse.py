"""Sparse merging methods: drop most values of each update, then add what is left, or let it vote.

A thinning and what follows it are functions apart, and a method of the table names one of each. A value's weight enters
before the vote, so a negative weight subtracts (mergekit's `ties` at its defaults adds it).
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moa.merging.methods.linear import Matrix, Weights
from moa.merging.methods.method import check_choice, check_share
from moa.merging.methods.stack import Stack, magnitudes_above, rounding_of

Block = Float[Tensor, "expert rows cols"]
Thin = Callable[[int, Tensor], Tensor]  # (first row, block) -> the block with values dropped
# (first row, block) -> which values are kept, and with which probability each would have
Keep = Callable[[int, Tensor], tuple[Bool[Tensor, "expert rows cols"], Tensor | float]]


def thin_and_combine(
    thin: Callable[..., Thin],
    combine: Callable[..., Matrix],
    own: frozenset[str],
    stack: Stack,
    weights: Weights,
    **options: object,
) -> Matrix:
    """A method of two parts; the options named in `own` are those of `thin`, the others those of `combine`."""
    thinned = thin(stack, **{key: value for key, value in options.items() if key in own})
    rest = {key: value for key, value in options.items() if key not in own}
    return stack.map(lambda start, block: combine(thinned(start, block), weights, stack.rounding, **rest))


def add(block: Block, weights: Weights, rounding: Tensor | None = None) -> Float[Tensor, "rows cols"]:
    """Take the weighted sum."""
    return torch.einsum("e,erc->rc", weights, block)


def elect(
    block: Block,
    weights: Weights,
    rounding: Float[Tensor, " expert"] | None = None,
    *,
    reduce: str = "mean",
    vote: str = "weighted",
) -> Float[Tensor, "rows cols"]:
    """Elect a sign per entry, and reduce (mean | sum | max) what agrees with it.

    TIES, steps 2 and 3: the sign with more mass wins. `weighted` votes on weight * value; mean divides by the weights'
    sum of the agreeing. `raw` votes before the weights, and mean divides by the number of the agreeing, as ties-merging
    and PEFT do; at weights of 1 they agree. Where the votes cancel, but for their own rounding and that of each
    expert's values (Stack.rounding), nothing is elected and the entry is 0.
    """
    check_choice("reduce", reduce, ("mean", "sum", "max"))
    check_choice("vote", vote, ("weighted", "raw"))
    weighted = weights[:, None, None] * block
    share = weights.abs() if vote == "weighted" else torch.ones_like(weights)
    voters = weighted if vote == "weighted" else block
    mass, unsure = voters.sum(0), rounding_of(voters.abs().sum(0))
    if rounding is not None:
        unsure = unsure + share @ rounding
    elected = mass.sign() * (mass.abs() > unsure)
    agrees = voters * elected > 0
    kept = weighted * agrees  # a product is several times faster than torch.where
    if reduce == "sum":
        return kept.sum(0)
    if reduce == "max":
        return kept.gather(0, kept.abs().argmax(0, keepdim=True))[0]
    total = torch.einsum("e,erc->rc", share, agrees.to(share.dtype))
    return kept.sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)


def largest(stack: Stack, *, density: float = 0.2, scope: str = "tensor", shared: Tensor | None = None) -> Thin:
    """Keep each update's largest values (the share `density`)."""
    check_share("density", density)
    limits = stack.thresholds(density) if shared is None else shared
    return lambda start, block: trim(block, limits)


def model_thresholds(stacks: Iterable[Stack], *, density: float, scope: str, **_) -> Tensor | None:
    """One threshold per expert over all sites, as ties-merging trims; None where each tensor has its own."""
    check_share("density", density)
    check_choice("scope", scope, ("tensor", "model"))
    return magnitudes_above(list(stacks), density) if scope == "model" else None


def trim(block: Block, thresholds: Float[Tensor, " expert"]) -> Block:
    return block * (block.abs() >= thresholds[:, None, None])


def without_outliers(stack: Stack, *, density: float = 0.85, outliers: float = 0.01) -> Thin:
    """Drop each update's largest values (the share `outliers`) and its smallest."""
    check_share("density", density)
    if not 0 <= outliers <= 1 - density:
        raise ValueError(f"options.outliers: must be in [0, 1 - density], got {outliers}")
    low, high = stack.thresholds(density + outliers), stack.thresholds(outliers)
    return lambda _, block: torch.where(block.abs() <= high[:, None, None], trim(block, low), 0.0)


def at_random(stack: Stack, *, density: float = 0.5, rescale: str = "inverse", seed: int = 0) -> Thin:
    """Keep each value with probability `density`, and rescale (unbiased with rescale=inverse)."""
    check_share("density", density)
    return _dropped(stack, rescale, lambda start, block: (_draws(stack, seed, start, block) < density, density))


def by_rank(
    stack: Stack, *, density: float = 0.5, spread: float = 0.15, rescale: str = "inverse", seed: int = 0
) -> Thin:
    """Keep larger values of a row more likely (density - spread to density + spread), and rescale."""
    check_share("density", density)
    if not 0 <= spread <= min(density, 1 - density):
        raise ValueError(f"options.spread: must keep density ± spread in [0, 1], got {spread}")

    def keep(start: int, block: Tensor) -> tuple[Tensor, Tensor]:
        order = block.abs().argsort(-1).argsort(-1).to(block.dtype)
        probability = density - spread + 2 * spread * order / max(block.shape[-1] - 1, 1)
        return _draws(stack, seed, start, block) < probability, probability

    return _dropped(stack, rescale, keep)


def _draws(stack: Stack, seed: int, start: int, block: Tensor) -> Block:
    return torch.stack([stack.uniform(seed, e, start, block.shape[1]) for e in range(len(block))])


def _dropped(stack: Stack, rescale: str, keep: Keep) -> Thin:
    """The block with some values dropped and the rest rescaled.

    `inverse` divides by each value's probability, so the expectation is the update's; `l1` gives each update its L1
    norm back, as mergekit does, which is biased for small tensors; `none` leaves the survivors.
    """
    check_choice("rescale", rescale, ("inverse", "l1", "none"))
    factor = _l1_factor(stack, keep) if rescale == "l1" else None

    def thin(start: int, block: Tensor) -> Tensor:
        mask, probability = keep(start, block)
        if rescale == "inverse":
            return torch.where(mask, block / probability, 0.0)
        kept = torch.where(mask, block, 0.0)
        return kept if factor is None else factor[:, None, None] * kept

    return thin


def _l1_factor(stack: Stack, keep: Keep) -> Float[Tensor, " expert"]:
    before, after = [], []
    for start, block in stack.blocks():
        before.append(block.abs().sum((1, 2)))
        after.append(torch.where(keep(start, block)[0], block, 0.0).abs().sum((1, 2)))
    left = torch.stack(after).sum(0)
    return torch.where(left > 0, torch.stack(before).sum(0) / left, 0.0)


def pcb(stack: Stack, weights: Weights, *, ratio: float = 0.1) -> Matrix:
    """Weigh each value by its size within its update and by its agreement with the sum; the top `ratio` count."""
    check_share("ratio", ratio)
    block = stack.whole()
    flat = block.flatten(1)
    size = _winsorised(flat.abs(), 1e-4, 1e-4)
    alone = (len(flat) * _to_unit(size).square()).exp()
    together = (flat * flat.sum(0)).tanh()
    score = _to_unit(_winsorised(alone * together, 1 - ratio, 0.0))
    merged = (weights[:, None] * flat.sign() * size * score).sum(0) / score.sum(0).clamp(min=1e-12)
    return merged.view(block.shape[1:])


def _winsorised(rows: Float[Tensor, "expert size"], low: float, high: float) -> Tensor:
    """Each row with its lowest share `low` and highest share `high` moved to the nearest kept value."""
    count = rows.shape[1]
    ordered = rows.sort(1).values
    least = ordered[:, min(int(count * low), count - 1), None]
    return rows.clamp(least, ordered[:, count - int(count * high) - 1, None])


def _to_unit(rows: Float[Tensor, "expert size"]) -> Tensor:
    low, high = rows.min(1, keepdim=True).values, rows.max(1, keepdim=True).values
    return (rows - low) / (high - low).clamp(min=torch.finfo(rows.dtype).tiny)


def consensus(stack: Stack, weights: Weights, *, threshold: float = 0.4, at_least: int = 2) -> Matrix:
    """The sum, where at least so many experts matter: |own| > threshold * |sum - own| (TALL masks)."""

    def merge_block(start: int, block: Tensor) -> Tensor:
        weighted = weights[:, None, None] * block
        total = weighted.sum(0)
        matters = weighted.abs() > threshold * (total - weighted).abs()
        return torch.where(matters.sum(0) >= at_least, total, 0.0)

    return stack.map(merge_block)
