"""Image-text retrieval where a picture has several captions: ranks, and from them R@1, R@5, R@10.

similarity = image_features @ text_features.T        [images, texts]
image to text: the rank of the best of a picture's captions;  text to image: of its picture
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 1024  # queries compared at a time: five thousand times 25,000 need no gigabytes


def best_rank(
    scores: Float[Tensor, "query candidate"], wanted: Bool[Tensor, "query candidate"]
) -> Int[Tensor, " query"]:
    """The rank (from 1) of each query's best wanted candidate.

    A candidate that is not wanted and scores the same stands before it: features that are all equal
    must not score 1. Scores that are not numbers rank last.
    """
    scores = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    best = scores.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~wanted).sum(1)


def retrieval_ranks(
    image_features: Float[Tensor, "images dim"],
    text_features: Float[Tensor, "texts dim"],
    image_of_text: Int[Tensor, " texts"],
) -> tuple[Int[Tensor, " images"], Int[Tensor, " texts"]]:
    """Image-to-text ranks, one a picture, and text-to-image ranks, one a caption.

    `image_of_text` is the row of each caption's picture. Features need not be normalised. Raises
    ValueError where a caption names no picture, or a picture has no caption.
    """
    count = len(image_features)
    used = image_of_text.unique()
    if len(image_of_text) and (used.min() < 0 or used.max() >= count):
        raise ValueError(f"retrieval: captions name pictures outside 0..{count - 1}")
    if len(used) < count:
        raise ValueError(f"retrieval: {count - len(used)} of {count} pictures have no caption")
    images = torch.nn.functional.normalize(image_features, dim=-1)
    texts = torch.nn.functional.normalize(text_features, dim=-1)
    rows = torch.arange(count, device=image_of_text.device)
    to_text = [
        best_rank(images[block] @ texts.T, image_of_text == block[:, None])
        for block in rows.split(BLOCK)
    ]
    to_image = [
        best_rank(part @ images.T, owner[:, None] == rows)
        for part, owner in zip(texts.split(BLOCK), image_of_text.split(BLOCK), strict=True)
    ]
    return torch.cat(to_text), torch.cat(to_image)


def recall_at(ranks: Sequence[int], k: int) -> list[float]:
    """Per query, 1 if the rank is at most k; the mean is R@k."""
    return [float(rank <= k) for rank in ranks]
