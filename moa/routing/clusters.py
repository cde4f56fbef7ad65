"""k-means over the evidence of samples, for a router with a row of logits for each cluster."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from torch import Tensor


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
    found = []
    for attempt in range(tries):
        centres, labels = kmeans2(
            points, number, minit="++", missing="raise", rng=np.random.default_rng([seed, attempt])
        )
        found.append((float(((points - centres[labels]) ** 2).sum()), centres, labels))
    _, centres, labels = min(found, key=lambda one: one[0])
    sizes = np.bincount(labels, minlength=number)
    order = np.argsort(-sizes, kind="stable")
    return torch.from_numpy(centres[order]).float(), sizes[order].tolist()
