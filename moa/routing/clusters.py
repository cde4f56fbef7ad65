"""k-means: the best of several starts, and over the evidence of samples, for a router with logits for each cluster."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from torch import Tensor


def best_clusters(
    points: np.ndarray, number: int, *, tries: int, seed: int = 0, missing: str = "warn"
) -> tuple[np.ndarray, np.ndarray]:
    """Centres [number, feature] and labels [point] of the run of k-means, from k-means++, with the least distance."""
    runs = [kmeans2(points, number, minit="++", missing=missing, rng=seed + place) for place in range(tries)]
    return min(runs, key=lambda run: float(((points - run[0][run[1]]) ** 2).sum()))


def k_means(
    rows: Sequence[Float[Tensor, "_ feature"]], number: int, tries: int, seed: int
) -> tuple[Float[Tensor, "number feature"], list[int]]:
    """The centres, the largest cluster first, and how many samples each has; ValueError where one would be empty."""
    points = torch.cat([*rows]).double().numpy()
    different = len(np.unique(points.round(6), axis=0))
    if number > different:
        raise ValueError(
            f"number: {number} clusters of {different} different samples; name fewer, or read more samples"
        )
    centres, labels = best_clusters(points, number, tries=tries, seed=seed, missing="raise")
    sizes = np.bincount(labels, minlength=number)
    order = np.argsort(-sizes, kind="stable")
    return torch.from_numpy(centres[order]).float(), sizes[order].tolist()
