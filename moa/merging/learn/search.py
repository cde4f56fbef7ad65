"""Weights of experts without a gradient: by a search, or one expert at a time. A score decides, by merging again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Score = Callable[[Mapping[str, float]], float]  # weights by expert -> the higher the better
Pair = tuple[str, str]  # path of a module with sites, expert


def search(score: Score, experts: Sequence[str], *, penalty: float = 0.05, **how: Any) -> dict[str, float]:
    """Weights without a gradient, from 0 in [-bound, bound]: the best score less `penalty` times their mean size.

    As LoraHub (Huang et al. 2024, equation 2) with its defaults, but `score` decides what is merged: on the updates,
    or, as released, on the factors (method lorahub_factors). `how` are options of `minimise`.
    """

    def loss(values: Sequence[float]) -> float:
        weights = dict(zip(experts, values, strict=True))
        return -score(weights) + penalty * sum(map(abs, weights.values())) / len(experts)

    return dict(zip(experts, minimise(loss, len(experts), **how), strict=True))


def minimise(
    loss: Callable[[list[float]], float],
    size: int,
    *,
    budget: int = 40,
    bound: float = 1.5,
    optimizer: str = "NGOpt",
    seed: int = 0,
) -> list[float]:
    """So many numbers in [-bound, bound], from 0, by one of nevergrad's optimizers, such as CMA."""
    import nevergrad

    if optimizer not in nevergrad.optimizers.registry:
        raise ValueError(f"optimizer: nevergrad has no {optimizer!r}; NGOpt and CMA are good ones")
    space = nevergrad.p.Array(init=[0.0] * size).set_bounds(-bound, bound)
    space.random_state.seed(seed)
    chosen = nevergrad.optimizers.registry[optimizer](space, budget=budget)
    return list(map(float, chosen.minimize(lambda values: loss(list(map(float, values)))).value))


def prune(
    score: Callable[[frozenset[Pair]], float], pairs: Sequence[Pair], *, share: float, **how: Any
) -> frozenset[Pair]:
    """The (module, expert) pairs without which a merge scores best: the `share` of them that a search puts lowest.

    ENMP (2604.17753) prunes a fifth of the modules by CMA-ES on validation data. Without any pruning is tried first.
    """
    found: dict[frozenset[Pair], float] = {frozenset(): score(frozenset())}

    def loss(values: Sequence[float]) -> float:
        order = sorted(range(len(pairs)), key=values.__getitem__)
        chosen = frozenset(pairs[place] for place in order[: round(share * len(pairs))])
        if chosen not in found:
            found[chosen] = score(chosen)
        return -found[chosen]

    minimise(loss, len(pairs), **how)
    return max(found, key=found.__getitem__)


def grid(score: Score, experts: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """One value for all experts, the best of `values`; the first of equals."""
    return max(({name: value for name in experts} for value in values), key=score)


def greedy_soup(score: Score, experts: Sequence[str]) -> dict[str, float]:
    """The uniform soup of the experts that help: best first, each kept only if the mean with it scores strictly better.

    Wortsman et al. 2022, recipe 1. Every expert is tried once; the others have weight 0.
    """
    alone = {name: score(soup([name], experts)) for name in experts}
    order = sorted(experts, key=lambda name: -alone[name])
    chosen, best = [order[0]], alone[order[0]]
    for name in order[1:]:
        found = score(soup([*chosen, name], experts))
        if found > best:
            chosen, best = [*chosen, name], found
    return soup(chosen, experts)


def prefix_soup(score: Score, order: Sequence[str]) -> dict[str, float]:
    """The uniform soup of the first experts of an order, as many as score best; the fewest of equals."""
    return max((soup(order[:count], order) for count in range(1, len(order) + 1)), key=score)


def soup(chosen: Sequence[str], experts: Sequence[str]) -> dict[str, float]:
    """The mean of the chosen experts; the others have weight 0."""
    return {name: 1 / len(chosen) if name in chosen else 0.0 for name in experts}


def order_by_uncertainty(probabilities: Mapping[str, Float[Tensor, "run question option"]]) -> list[str]:
    """Experts from the surest to the least sure, without labels: by H(mean p) - mean H(p) over perturbed runs.

    UQ-Merge (Qu et al. 2025): the mutual information between answer and perturbation. The released code merges the sum
    so far with the next expert half and half, so that the last one weighs most; here all chosen weigh the same.
    """

    def information(p: Tensor) -> float:
        return float((_entropy(p.mean(0)) - _entropy(p).mean(0)).mean())

    return sorted(probabilities, key=lambda name: information(probabilities[name]))


def _entropy(p: Float[Tensor, "*axes option"]) -> Float[Tensor, "*axes"]:
    return -torch.special.xlogy(p, p).sum(-1)
