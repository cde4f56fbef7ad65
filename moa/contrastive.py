"""Losses of image-text pairs, one value per sample, over the negatives of all processes.

    CLIP (Radford et al. 2021)     1/2 (CE of an image's own text among all + CE of a text's own image)
    SigLIP (Zhai et al. 2023)      -log sigmoid(+-logit), summed over all texts

A pair that is not a true negative, because another sample has the same text or image, is left out.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def softmax_loss(
    image_logits: Float[Tensor, "batch all"],
    text_logits: Float[Tensor, "batch all"],
    own: Int[Tensor, " batch"],
    ignored: Bool[Tensor, "batch all"],
) -> Float[Tensor, " batch"]:
    """CLIP's loss. `image_logits` are images against all texts, `text_logits` texts against all
    images; `own` is the column of a sample's partner, which `ignored` never names."""
    losses = [
        F.cross_entropy(logits.float().masked_fill(ignored, -torch.inf), own, reduction="none")
        for logits in (image_logits, text_logits)
    ]
    return 0.5 * (losses[0] + losses[1])


def sigmoid_loss(
    image_logits: Float[Tensor, "batch all"],
    own: Int[Tensor, " batch"],
    ignored: Bool[Tensor, "batch all"],
) -> Float[Tensor, " batch"]:
    """SigLIP's loss of each image with all texts."""
    positive = F.one_hot(own, image_logits.shape[1]).bool()
    sign = torch.where(positive, 1.0, -1.0)
    return -F.logsigmoid(sign * image_logits.float()).masked_fill(ignored, 0.0).sum(1)


def not_negatives(
    texts: Int[Tensor, " all"], images: Int[Tensor, " all"], own: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch all"]:
    """Where another sample has the same text or image (by key), so that it is not a negative."""
    same = (texts[own, None] == texts) | (images[own, None] == images)
    return same & ~F.one_hot(own, len(texts)).bool()


def compared(
    images: Float[Tensor, "batch dim"], texts: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, "batch 2 dim"], Int[Tensor, "batch 1"]]:
    """Normalised features side by side, and the nearest text of each image."""
    nearest = (images @ texts.T).argmax(1)
    return torch.stack([images, texts], 1).float(), nearest[:, None]


def batch_sizes(count: int, device: torch.device) -> list[int]:
    """The number of samples that each process has; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [count]
    own = torch.tensor([count], device=device)
    sizes = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    return [int(size) for size in sizes]


def gather_rows(rows: Shaped[Tensor, "_ ..."], sizes: list[int]) -> Shaped[Tensor, "_ ..."]:
    """The rows of all processes in their order; a row's gradient is the sum over all processes.

    `sizes` are the numbers of rows of each process, from `batch_sizes`.
    """
    gathered: Tensor = rows if len(sizes) == 1 else _GatherRows.apply(rows, sizes)
    return gathered


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward adds the processes' gradients up, on every backend."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = F.pad(rows.flatten(1) if rows.dim() > 1 else rows[:, None], (0, 0, 0, max(sizes) - len(rows)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.contiguous())
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.view(-1, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.sizes)[dist.get_rank()], None
