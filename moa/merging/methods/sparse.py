"""Sparse merging methods: drop most values of each update, then settle whose sign wins.

The pruning and the vote are apart: every method is a way to thin the updates, followed by `elect` or by a plain sum.
A value's weight enters before the vote, so a negative weight subtracts (mergekit's `ties` at its defaults adds it).
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moa.merging.methods.linear import Matrix, Weights
from moa.merging.methods.method import SPACES, Method, check_choice
from moa.merging.methods.stack import Stack, magnitudes_above, rounding_of

Block = Float[Tensor, "expert rows cols"]
REDUCTIONS = ("mean", "sum", "max")
VOTES = ("weighted", "raw")
SCOPES = ("tensor", "model")
RESCALES = ("inverse", "l1", "none")


# From thinned updates to one ------------------------------------------------------------------------


def elect(
    block: Block,
    weights: Weights,
    reduce: str = "mean",
    vote: str = "weighted",
    rounding: Float[Tensor, " expert"] | None = None,
) -> Float[Tensor, "rows cols"]:
    """Per entry, the sign with more mass wins, and the values that agree with it are reduced (TIES, steps 2 and 3).

    `weighted` votes on weight * value; mean divides by the weights' sum of the agreeing. `raw` votes before the
    weights, and mean divides by the number of the agreeing, as ties-merging and PEFT do; at weights of 1 they agree.
    Where the votes cancel, but for their own rounding and that of each expert's values (Stack.rounding), nothing is
    elected and the entry is 0.
    """
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


def add(block: Block, weights: Weights) -> Float[Tensor, "rows cols"]:
    return torch.einsum("e,erc->rc", weights, block)


# By magnitude ---------------------------------------------------------------------------------------


def trim(block: Block, thresholds: Float[Tensor, " expert"]) -> Block:
    return block * (block.abs() >= thresholds[:, None, None])


def model_thresholds(stacks: Iterable[Stack], *, density: float, scope: str, **_) -> Tensor | None:
    """One threshold per expert over all sites, as ties-merging trims; None where each tensor has its own."""
    check_share("density", density)
    check_choice("scope", scope, SCOPES)
    return magnitudes_above(list(stacks), density) if scope == "model" else None


def ties(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.2,
    scope: str = "tensor",
    vote: str = "weighted",
    reduce: str = "mean",
    shared: Tensor | None = None,
) -> Matrix:
    """Keep each update's largest values, elect a sign per entry, reduce (mean | sum | max) those that agree."""
    check_choice("reduce", reduce, REDUCTIONS)
    check_choice("vote", vote, VOTES)
    limits = _limits(stack, density, shared)
    return stack.map(
        lambda start, block: elect(trim(block, limits), weights, reduce, vote, stack.rounding)
    )


def magnitude_prune(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.2,
    scope: str = "tensor",
    shared: Tensor | None = None,
) -> Matrix:
    """Keep each update's largest values, then the weighted sum."""
    limits = _limits(stack, density, shared)
    return stack.map(lambda start, block: add(trim(block, limits), weights))


def _limits(stack: Stack, density: float, shared: Tensor | None) -> Tensor:
    return stack.thresholds(density) if shared is None else shared


def breadcrumbs(
    stack: Stack, weights: Weights, *, density: float = 0.85, outliers: float = 0.01
) -> Matrix:
    """Drop each update's largest values (the share `outliers`) and its smallest, then the weighted sum."""
    return stack.map(_between(stack, density, outliers, lambda block: add(block, weights)))


def breadcrumbs_ties(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.85,
    outliers: float = 0.01,
    reduce: str = "mean",
) -> Matrix:
    """Drop each update's largest and smallest values, then elect a sign per entry as TIES does."""
    check_choice("reduce", reduce, REDUCTIONS)
    return stack.map(
        _between(
            stack,
            density,
            outliers,
            lambda block: elect(block, weights, reduce, rounding=stack.rounding),
        )
    )


def _between(
    stack: Stack, density: float, outliers: float, reduce: Callable[[Tensor], Tensor]
) -> Callable[[int, Tensor], Tensor]:
    check_share("density", density)
    if not 0 <= outliers <= 1 - density:
        raise ValueError(f"options.outliers: must be in [0, 1 - density], got {outliers}")
    low, high = stack.thresholds(density + outliers), stack.thresholds(outliers)

    def merge_block(start: int, block: Tensor) -> Tensor:
        return reduce(torch.where(block.abs() <= high[:, None, None], trim(block, low), 0.0))

    return merge_block


# At random ------------------------------------------------------------------------------------------


def dare_linear(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.5,
    rescale: str = "inverse",
    seed: int = 0,
) -> Matrix:
    """Keep each value with probability `density`, rescale, then the weighted sum: unbiased with rescale=inverse."""
    thinned = _dropped(stack, rescale, _keep_evenly(stack, density, seed))
    return stack.map(lambda start, block: add(thinned(start, block), weights))


def dare_ties(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.5,
    rescale: str = "inverse",
    reduce: str = "sum",
    seed: int = 0,
) -> Matrix:
    """Keep each value with probability `density`, rescale, then elect a sign per entry as TIES does."""
    check_choice("reduce", reduce, REDUCTIONS)
    thinned = _dropped(stack, rescale, _keep_evenly(stack, density, seed))
    return stack.map(
        lambda start, block: elect(thinned(start, block), weights, reduce, rounding=stack.rounding)
    )


def della(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.5,
    spread: float = 0.15,
    rescale: str = "inverse",
    reduce: str = "sum",
    seed: int = 0,
) -> Matrix:
    """Keep larger values of a row more likely (density - spread to density + spread), rescale, elect as TIES does."""
    check_choice("reduce", reduce, REDUCTIONS)
    thinned = _dropped(stack, rescale, _keep_by_rank(stack, density, spread, seed))
    return stack.map(
        lambda start, block: elect(thinned(start, block), weights, reduce, rounding=stack.rounding)
    )


def della_linear(
    stack: Stack,
    weights: Weights,
    *,
    density: float = 0.5,
    spread: float = 0.15,
    rescale: str = "inverse",
    seed: int = 0,
) -> Matrix:
    """Keep larger values of a row more likely (density - spread to density + spread), rescale, then the sum."""
    thinned = _dropped(stack, rescale, _keep_by_rank(stack, density, spread, seed))
    return stack.map(lambda start, block: add(thinned(start, block), weights))


# (first row, block) -> which values stay, and with which probability each would have
Keep = Callable[[int, Tensor], tuple[Bool[Tensor, "expert rows cols"], Tensor | float]]


def _keep_evenly(stack: Stack, density: float, seed: int) -> Keep:
    check_share("density", density)
    return lambda start, block: (_draws(stack, seed, start, block) < density, density)


def _keep_by_rank(stack: Stack, density: float, spread: float, seed: int) -> Keep:
    check_share("density", density)
    if not 0 <= spread <= min(density, 1 - density):
        raise ValueError(f"options.spread: must keep density ± spread in [0, 1], got {spread}")

    def keep(start: int, block: Tensor) -> tuple[Tensor, Tensor]:
        order = block.abs().argsort(-1).argsort(-1).to(block.dtype)
        probability = density - spread + 2 * spread * order / max(block.shape[-1] - 1, 1)
        return _draws(stack, seed, start, block) < probability, probability

    return keep


def _draws(stack: Stack, seed: int, start: int, block: Tensor) -> Block:
    return torch.stack(
        [stack.uniform(seed, expert, start, block.shape[1]) for expert in range(len(block))]
    )


def _dropped(stack: Stack, rescale: str, keep: Keep) -> Callable[[int, Tensor], Tensor]:
    """The block with some values dropped and the rest rescaled.

    `inverse` divides by each value's probability, so the expectation is the update's; `l1` gives each update its L1
    norm back, as mergekit does, which is biased for small tensors; `none` leaves the survivors.
    """
    check_choice("rescale", rescale, RESCALES)
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


# By agreement ---------------------------------------------------------------------------------------


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


def consensus(
    stack: Stack, weights: Weights, *, threshold: float = 0.4, at_least: int = 2
) -> Matrix:
    """The sum, where at least so many experts matter: |own| > threshold * |sum - own| (TALL masks)."""

    def merge_block(start: int, block: Tensor) -> Tensor:
        weighted = weights[:, None, None] * block
        total = weighted.sum(0)
        matters = weighted.abs() > threshold * (total - weighted).abs()
        return torch.where(matters.sum(0) >= at_least, total, 0.0)

    return stack.map(merge_block)


def check_share(key: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"options.{key}: must be in (0, 1], got {value}")


METHODS = {
    "ties": Method(
        function=ties,
        prepare=model_thresholds,
        default_weights="ones",
        spaces=tuple(SPACES),
        paper="TIES-Merging (Yadav et al., 2023)",
    ),
    "knots": Method(
        function=ties,
        prepare=model_thresholds,
        default_weights="ones",
        spaces=("rows",),
        paper="KnOTS (Stoica et al., 2025): TIES on the experts' common output directions",
    ),
    "magnitude_prune": Method(
        function=magnitude_prune,
        prepare=model_thresholds,
        default_weights="ones",
        spaces=tuple(SPACES),
        paper="PEFT's magnitude_prune: task arithmetic on the largest values",
    ),
    "dare_linear": Method(
        function=dare_linear,
        default_weights="mean",
        spaces=tuple(SPACES),
        paper="DARE: Language Models are Super Mario (Yu et al., 2024)",
    ),
    "dare_ties": Method(
        function=dare_ties,
        default_weights="mean",
        spaces=tuple(SPACES),
        paper="DARE (Yu et al., 2024) with the vote of TIES",
    ),
    "della": Method(
        function=della,
        default_weights="mean",
        spaces=tuple(SPACES),
        paper="DELLA-Merging (Deep et al., 2024)",
    ),
    "della_linear": Method(
        function=della_linear,
        default_weights="mean",
        spaces=tuple(SPACES),
        paper="DELLA-Merging (Deep et al., 2024), without the vote",
    ),
    "breadcrumbs": Method(
        function=breadcrumbs,
        default_weights="mean",
        spaces=tuple(SPACES),
        paper="Model Breadcrumbs (Davari and Belilovsky, 2024)",
    ),
    "breadcrumbs_ties": Method(
        function=breadcrumbs_ties,
        default_weights="mean",
        spaces=tuple(SPACES),
        paper="Model Breadcrumbs (Davari and Belilovsky, 2024) with the vote of TIES",
    ),
    "pcb": Method(
        function=pcb,
        default_weights="ones",
        spaces=tuple(SPACES),
        paper="Parameter Competition Balancing (Du et al., 2024)",
    ),
    "consensus": Method(
        function=consensus,
        default_weights="ones",
        spaces=tuple(SPACES),
        paper="TALL masks and Consensus Merging (Wang et al., 2024)",
    ),
}
