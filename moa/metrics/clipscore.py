"""CLIPScore: how well a caption fits its image by CLIP, without references and with them.

    CLIPScore    = 2.5 * max(cos(image, caption), 0)
    RefCLIPScore = harmonic mean of CLIPScore and max over references of max(cos(caption, ref), 0)

Hessel et al. 2021 (arXiv 2104.08718), with `PREFIX` before every text. torchmetrics' CLIPScore is 100 * cos.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

PREFIX = "A photo depicts "
WEIGHT = 2.5


def clip_score(
    image_features: Float[Tensor, "captions dim"], text_features: Float[Tensor, "captions dim"]
) -> Float[Tensor, " captions"]:
    """CLIPScore of each image and its caption."""
    return WEIGHT * cosine_similarity(image_features, text_features, dim=-1).clamp(min=0)


def ref_clip_score(
    image_features: Float[Tensor, "captions dim"],
    text_features: Float[Tensor, "captions dim"],
    reference_features: Sequence[Float[Tensor, "_ dim"]],
) -> Float[Tensor, " captions"]:
    """RefCLIPScore of each caption; 0 where both sides are 0 (the published code has no number)."""
    alone = clip_score(image_features, text_features)
    nearest = torch.stack([
        cosine_similarity(text[None], references, dim=-1).clamp(min=0).amax()
        for text, references in zip(text_features, reference_features, strict=True)
    ])  # fmt: skip
    return torch.where(alone + nearest > 0, 2 * alone * nearest / (alone + nearest), torch.zeros_like(alone))
