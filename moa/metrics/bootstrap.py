"""How sure a difference between two rows of a table is, over questions and seeds together.

Scores are [seed, question]: the same seeds and questions for both rows, so that differences are paired. A replicate
draws the questions of every column and the seeds anew, and both rows use the same draw: the pigeonhole bootstrap of
crossed factors (Owen 2007, arXiv 0711.0990), which is conservative. Of n units n - 1 are drawn, so that the variance of
a mean over few seeds is unbiased (Rao and Wu 1988). With one seed the interval is over its questions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float

Array = np.ndarray
Kind = Literal["difference", "ratio"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the ends of its percentile interval."""

    value: float
    low: float
    high: float


def paired_interval(
    first: Sequence[Float[Array, "seed _"]],
    second: Sequence[Float[Array, "seed _"]],
    *,
    kind: Kind = "difference",
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Of `first` - `second`, or `first` / `second`, each the mean of the means of its columns.

    Entry i of both is one column of questions: [seed, question], the same questions and seeds in both. Each column is
    drawn by itself, the seeds alike in all of them. ValueError where the shapes differ.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"needs the same columns in both, got {len(first)} and {len(second)}")
    for ours, theirs in zip(first, second, strict=True):
        if ours.shape != theirs.shape or not ours.size or len(ours) != len(first[0]):
            raise ValueError(f"needs the same seeds and questions in both, got {ours.shape} and {theirs.shape}")
    seeds = drawn_shares(len(first[0]), draws, seed, 0)
    sums = np.zeros((2, draws))
    for number, columns in enumerate(zip(first, second, strict=True), start=1):
        questions = drawn_shares(columns[0].shape[1], draws, seed, number)
        for row, scores in enumerate(columns):
            sums[row] += np.einsum("sd,sd->d", seeds, scores @ questions)
    found = compared(sums[0] / len(first), sums[1] / len(first), kind)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(found, [tail, 100 - tail])
    [centre] = compared(grand_mean(first), grand_mean(second), kind)
    return Interval(value=float(centre), low=float(low), high=float(high))


@lru_cache(maxsize=16)  # a table draws the same for every row
def drawn_shares(count: int, draws: int, seed: int, stream: int) -> Float[Array, "count draws"]:
    """How large a share of each draw every unit is; of one unit all."""
    number, rng = max(count - 1, 1), np.random.default_rng([seed, stream])
    return rng.multinomial(number, np.full(count, 1 / count), size=draws).T / number


def grand_mean(columns: Sequence[Float[Array, "seed _"]]) -> Float[Array, " 1"]:
    return np.mean([scores.mean() for scores in columns], keepdims=True)


def compared(first: Float[Array, " draws"], second: Float[Array, " draws"], kind: Kind) -> Float[Array, " draws"]:
    if kind == "difference":
        return first - second
    with np.errstate(divide="ignore", invalid="ignore"):
        return first / second
