"""Ranks of candidates: retrieval where an image has several captions, and classification.

similarity = image_features @ text_features.T        [images, texts]
image to text: the rank of the best of an image's captions;  text to image: of its image
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 1024  # queries compared at a time: five thousand times 25,000 need no gigabytes


class Ranking(NamedTuple):
    """Per query: the rank (from 1) of its best wanted candidate, and the candidate that is nearest."""

    rank: Int[Tensor, " query"]
    nearest: Int[Tensor, " query"]


def rank_candidates(scores: Float[Tensor, "query candidate"], wanted: Bool[Tensor, "query candidate"]) -> Ranking:
    """The ranking of every row.

    A candidate that is not wanted and scores the same is ranked before the wanted ones: features that
    are all equal must not score 1. Scores that are not numbers rank last.
    """
    scores = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    best = scores.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
    return Ranking(1 + ((scores >= best) & ~wanted).sum(1), scores.argmax(1))


def rank_retrieval(
    image_features: Float[Tensor, "images dim"],
    text_features: Float[Tensor, "texts dim"],
    image_of_text: Int[Tensor, " texts"],
) -> tuple[Ranking, Ranking]:
    """Image to text, a query an image, and text to image, a query a caption; `image_of_text` is a row for each caption.

    ValueError where a caption names no image, or an image has no caption.
    """
    count = len(image_features)
    used = image_of_text.unique()
    if len(used) and (used.min() < 0 or used.max() >= count):
        raise ValueError(f"retrieval: captions name images outside 0..{count - 1}")
    if len(used) < count:
        raise ValueError(f"retrieval: {count - len(used)} of {count} images have no caption")
    images, texts = normalize(image_features, dim=-1), normalize(text_features, dim=-1)
    rows = torch.arange(count, device=image_of_text.device)
    to_text = [rank_candidates(images[block] @ texts.T, image_of_text == block[:, None]) for block in rows.split(BLOCK)]
    to_image = [
        rank_candidates(part @ images.T, owner[:, None] == rows)
        for part, owner in zip(texts.split(BLOCK), image_of_text.split(BLOCK), strict=True)
    ]
    (first, second) = (
        Ranking(*(torch.cat(part) for part in zip(*blocks, strict=True))) for blocks in (to_text, to_image)
    )
    return first, second


def recall_at(ranks: Sequence[int], k: int) -> list[float]:
    """Per query, 1 if the rank is at most k; the mean is R@k."""
    return [float(rank <= k) for rank in ranks]


def mean_per_class_accuracy(hits: Sequence[float], classes: Sequence[Hashable]) -> float:
    """The mean of the accuracies of the classes that occur, as CLIP reports Caltech-101, pets, Flowers and Aircraft."""
    found: dict[Hashable, list[float]] = defaultdict(list)
    for hit, name in zip(hits, classes, strict=True):
        found[name].append(hit)
    means = [sum(values) / len(values) for values in found.values()]
    return sum(means) / len(means) if means else float("nan")
