"""From features of images and texts: ranks of candidates, where an image may have several captions, and CLIPScore.

similarity = image_features @ text_features.T        [images, texts]
image to text: the rank of the best of an image's captions;  text to image: of its image

    CLIPScore    = 2.5 * max(cos(image, caption), 0)
    RefCLIPScore = harmonic mean of CLIPScore and max over references of max(cos(caption, ref), 0)

Hessel et al. 2021 (arXiv 2104.08718), with `PREFIX` before every text. torchmetrics' CLIPScore is 100 * cos.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

Captions = Float[Tensor, "captions dim"]
References = Sequence[Float[Tensor, "_ dim"]]
PREFIX, WEIGHT = "A photo depicts ", 2.5  # of CLIPScore
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
    ValueError where a caption names no image, or an image has no caption."""
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


def clip_score(image_features: Captions, text_features: Captions) -> Float[Tensor, " captions"]:
    return WEIGHT * cosine_similarity(image_features, text_features, dim=-1).clamp(min=0)


def ref_clip_score(
    image_features: Captions, text_features: Captions, reference_features: References
) -> Float[Tensor, " captions"]:
    """RefCLIPScore of each caption; 0 where both sides are 0 (the published code has no number)."""
    alone = clip_score(image_features, text_features)
    nearest = torch.stack([
        cosine_similarity(text[None], references, dim=-1).clamp(min=0).amax()
        for text, references in zip(text_features, reference_features, strict=True)
    ])  # fmt: skip
    return torch.where(alone + nearest > 0, 2 * alone * nearest / (alone + nearest), torch.zeros_like(alone))
