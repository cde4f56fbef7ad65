"""How sure a mean is whose questions are about the same images, and a difference between two rows of a table.

The latter is over questions and seeds together.
Scores are [seed, question]: the same seeds and questions for both rows, so that differences are paired. Seeds and
questions are crossed random factors (Brennan 2001, Generalizability Theory, chapter 3): the variance of the mean is
that of the seeds' means, plus that of the questions' means, less what both of them have of single answers. Each part
has Student's factor of its own (Cochran 1964), so that few seeds that differ much give the wide interval that they
deserve: percentiles of a bootstrap over five of them hold the truth in 86 % of the cases and not in 95. With one seed
the interval is over its questions alone.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Array = np.ndarray
Kind = Literal["difference", "ratio"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def paired_interval(
    first: Sequence[Float[Array, "seed _"]],
    second: Sequence[Float[Array, "seed _"]],
    *,
    kind: Kind = "difference",
    level: float = 0.95,
) -> Interval:
    """Of `first` - `second`, or `first` / `second`, each the mean of the means of its columns.

    Entry i of both is one column of questions: [seed, question], the same questions and seeds in both. Columns are
    questions of their own, the seeds are alike in all of them. A ratio is linear in small changes (the delta method).
    ValueError where the shapes differ.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"needs the same columns in both, got {len(first)} and {len(second)}")
    for ours, theirs in zip(first, second, strict=True):
        if ours.shape != theirs.shape or not ours.size or len(ours) != len(first[0]):
            raise ValueError(f"needs the same seeds and questions in both, got {ours.shape} and {theirs.shape}")
    above, below = grand_mean(first), grand_mean(second)
    value, scale, size = above - below, 1.0, 1.0
    if kind == "ratio":
        if not below:
            return Interval(value=math.inf if above else math.nan, low=math.nan, high=math.nan)
        value = scale = above / below
        size = below
    changes = [(a - scale * b) / size for a, b in zip(first, second, strict=True)]
    half = half_width(changes, level)
    return Interval(value=value, low=value - half, high=value + half)


def half_width(columns: Sequence[Float[Array, "seed _"]], level: float) -> float:
    from scipy.special import stdtrit  # Student's quantiles; late, as commands print their help without scipy

    seeds, number = len(columns[0]), len(columns)
    by_seed = np.mean([scores.mean(1) for scores in columns], axis=0)
    of_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    of_questions = sum(variance_of_mean(scores.mean(0)) for scores in columns) / number**2
    answers = sum(of_answers(scores) for scores in columns) / number**2 if seeds > 1 else 0.0
    freedom_of_questions = max(sum(scores.shape[1] - 1 for scores in columns), 1)
    parts = (of_seeds, seeds - 1), (max(of_questions - answers, 0.0), freedom_of_questions)
    squares = [float(stdtrit(max(freedom, 1), (1 + level) / 2)) ** 2 * float(part) for part, freedom in parts]
    return sum(squares) ** 0.5


def variance_of_mean(values: Float[Array, " unit"]) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def of_answers(scores: Float[Array, "seed question"]) -> float:
    """What single answers, which neither seed nor question explains, add to the variance of the mean."""
    seeds, questions = scores.shape
    if questions == 1:
        return 0.0
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    return float((rest**2).sum()) / ((seeds - 1) * (questions - 1)) / (seeds * questions)


def grand_mean(columns: Sequence[Float[Array, "seed _"]]) -> float:
    return float(np.mean([scores.mean() for scores in columns]))


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The standard error of a mean whose values come in clusters (all questions of one image).

        sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n,   G clusters, n values

    (Miller 2024, arXiv 2411.00640, with the small-sample factor.) With clusters of one it is the
    usual s / sqrt(n). None for fewer than two clusters: there it is unknown, not zero.
    """
    mean = sum(values) / max(len(values), 1)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(s * s for s in sums.values())) / len(values)
