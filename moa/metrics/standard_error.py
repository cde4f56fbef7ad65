"""The standard error of a mean when several questions are about one image."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


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
